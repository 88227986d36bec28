"""Times of calls that shared the same machine: interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], seconds: float, min_rounds: int = 5
) -> dict[str, float]:
    """Median seconds per call, of rounds in which every call runs once, in turn.

    Args:
        calls: name → what to time; each runs twice before the clock starts.
        seconds: how long to measure in all; ``min_rounds`` rounds are run in any case.
    """
    for call in calls.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}
