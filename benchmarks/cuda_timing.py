"""Time of calls on a CUDA device, in turns, from a cold cache; what it can copy meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import harness

COPY = "copy"
FLUSHED = 256 << 20  # bytes read between calls: several times any device's L2
COPIED = 256 << 20  # bytes, a way
_CYCLES = 2e9  # of a second, at most
Call = Callable[[], object]
Build = Callable[[], Call]


class Skip(Exception):
    """What is not measured here, and why."""


class Compiled(Exception):
    """A row's kernels are compiled, and nothing ran."""


def is_lost() -> bool:
    """Whether the process can use the device no more."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of each candidate, an entry a round. host: seconds until a call returned.

    refused: what of peers did not run, and why. results: of the first calls.
    """

    seconds: Mapping[str, tuple[float, ...]]
    host: Mapping[str, float]
    refused: Mapping[str, str]
    results: Mapping[str, Any]

    def faster(self, of: str, over: str) -> list[float] | None:
        """How many times faster ``of`` is than ``over``; None where that did not run."""
        if over not in self.seconds:
            return None
        return self._quartiles(over, lambda mine, other: other / mine, of)

    def share(self, of: str, amount: float, over: str, its: float) -> list[float]:
        """amount/time of ``of``, in multiples of its/time of ``over``."""
        return self._quartiles(over, lambda mine, other: amount / mine / (its / other), of)

    def rate(self, of: str, amount: float) -> list[float]:
        """amount/time."""
        return self._quartiles(of, lambda mine, other: amount / mine, of)

    def _quartiles(self, over: str, value: Callable[[float, float], float],
                   of: str) -> list[float]:
        return quartiles([value(mine, other) for mine, other in zip(
            self.seconds[of], self.seconds[over], strict=True)])

    def result(self, figures: Mapping[str, list[float] | None], **more: Any) -> dict[str, Any]:
        """A row of them, without those of peers that did not run."""
        times = {name: quartiles(found) for name, found in self.seconds.items()}
        return {"figures": {name: value for name, value in figures.items() if value is not None},
                "seconds": {name: [low, middle, high]
                            for name, (middle, low, high) in times.items()},
                "host": dict(self.host), "refused": dict(self.refused), **more}


def quartiles(values: Collection[float]) -> list[float]:
    """[median, first, third]."""
    if len(values) < 2:
        return list(values) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [middle, low, high]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where rows are measured, and how often. compile_only: kernels are compiled, nothing is run.
    """

    device: torch.device
    rounds: int
    compile_only: bool = False

    @property
    def small(self) -> bool:
        """Whether this is a try without a device."""
        return self.device.type == "cpu"

    def compiled(self, run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """``torch.compile`` of it; itself in a try, which is short."""
        return run if self.small else torch.compile(run, **options)

    def graph(self, run: Call) -> Call:
        """The replay of a CUDA graph of ``run``; of itself in a try."""
        if self.small:
            return run
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            held = run()

        def replay() -> object:
            captured.replay()
            return held

        return replay

    def copying(self) -> tuple[Build, int]:
        """A copy on the device, and the bytes that it reads and writes."""
        size = 4096 if self.small else COPIED

        def build() -> Call:
            source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)

        return build, 2 * size

    def compare(self, builds: Mapping[str, Build], peers: Collection[str] = (), calls: int = 1,
                cold: bool = True, held: bool = True, rounds: int | None = None) -> Measured:
        """Time all candidates in every round, in an order shuffled per round.

        peers: may fail, and are then left out. calls: of one sample, which are timed together.
        cold: the L2 cache is filled with something else before. held: the device waits until the
        host has launched everything, so that what the host takes is not counted.
        """
        runs: dict[str, Call] = {}
        results: dict[str, Any] = {}
        first: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, build in builds.items():
            if self.compile_only and name in {COPY, *peers}:
                continue
            try:
                with compiling() if self.compile_only else contextlib.nullcontext():
                    run = build()
                    started = time.perf_counter()
                    results[name] = run()
                    first[name] = time.perf_counter() - started
                self.wait()
            except Exception as error:
                if name not in peers or (not self.small and is_lost()):
                    raise
                refused[name] = (str(error) if isinstance(error, Skip)
                                 else harness.error_text(error, 240))
            else:
                runs[name] = run
        if self.compile_only:
            raise Compiled
        if self.small:  # one call each is enough to try them
            return Measured({name: (first[name],) for name in runs}, first, refused, results)
        seconds, host = self._rounds(runs, _Clock(self, calls, cold, held), rounds or self.rounds)
        return Measured(seconds, host, refused, results)

    def _rounds(self, runs: Mapping[str, Call], clock: _Clock,
                rounds: int) -> tuple[dict[str, tuple[float, ...]], dict[str, float]]:
        for run in (*runs.values(), *runs.values()):
            run()
        host = {name: clock.host(run) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        order, shuffle = list(runs), random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                seconds[name].append(clock.sample(runs[name], host[name]))
        return {name: tuple(found) for name, found in seconds.items()}, host

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if not self.small:
            torch.cuda.synchronize()


class _Clock:
    """Of calls on a device."""

    def __init__(self, bench: Bench, calls: int, cold: bool, held: bool) -> None:
        self.bench, self.calls, self.held = bench, calls, held
        self.other = torch.zeros(FLUSHED // 4 if cold else 0, device=bench.device)
        self.sum = torch.zeros((), device=bench.device)

    def host(self, run: Call) -> float:
        """Seconds until a call returned, the least of three."""
        found: list[float] = []
        for _ in range(3):
            self.bench.wait()
            started = time.perf_counter()
            run()
            found.append(time.perf_counter() - started)
        self.bench.wait()
        return min(found)

    def sample(self, run: Call, host: float) -> float:
        """Seconds of a call."""
        if len(self.other):  # read, not written: nothing is left to be written back
            torch.sum(self.other, 0, out=self.sum)
        if self.held:
            wait = min(1.5 * host * self.calls + 2e-4, 0.1)
            torch.cuda._sleep(int(wait * _CYCLES))
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / self.calls


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Launches compile their kernel, with each tile that would be tried, and run nothing."""
    from scaleprop.backends.cuda import attention, dequantizing, fusing, products, quantizing

    def compile_only(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        kernel.warmup(*arguments, grid=grid, **constants, enable_fp_fusion=False)

    with contextlib.ExitStack() as stack:
        for module in (attention, dequantizing, fusing, products, quantizing):
            stack.enter_context(mock.patch.object(module, "launch", compile_only))
        yield


def rotating(runs: list[Call]) -> Call:
    """One after the other, a call each: on data of their own, which no cache holds together."""
    place = 0

    def run() -> object:
        nonlocal place
        place = (place + 1) % len(runs)
        return runs[place]()

    return run


def wrong(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    difference = (got.double() - want.double()).norm() / want.double().norm()
    return float(difference)
