"""What a change does whatever else is chosen: the main effects of a grid, axis by axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from scaleprop.errors import ConfigError
from scaleprop.sweeps.results import Mean, Point, Sweep


@dataclasses.dataclass(frozen=True)
class Effect:
    """How much ``value`` changes the loss against the axis's first value.

    percent: of that loss's size, over ``count`` pairs of runs which differ in the axis alone, seed
    by seed; less than 0 is better. Its standard error takes the pairs for independent. Pairs of
    which one diverged are left out, and counted; a loss of 0 has no per cent.
    """

    axis: str
    value: str
    against: str
    percent: Mean
    diverged: int


def effects(sweep: Sweep, within: Mapping[str, str] | None = None) -> list[Effect]:
    """Every value of every axis but the first ones, in the order of the grid; ``within`` the
    combinations that have these values alone.

    Raises:
        ConfigError: where none has.
    """
    chosen = [point for point in sweep.points
              if all(point.axes.get(axis) == value for axis, value in (within or {}).items())]
    if within and not chosen:
        raise ConfigError(f"no combination has {dict(within)}; axes: {', '.join(sweep.axes)}")
    points = {_key(point.axes): point for point in chosen}
    found: list[Effect] = []
    for axis in sweep.axes:
        values = dict.fromkeys(point.axes[axis] for point in chosen if axis in point.axes)
        first = next(iter(values), "")
        for value in list(values)[1:]:
            pairs = [(points[key], point) for point in chosen if point.axes.get(axis) == value
                     if (key := _key({**point.axes, axis: first})) in points]
            changes = [change for pair in pairs for change in _changes(*pair)]
            finite = [change for change in changes if math.isfinite(change)]
            found.append(Effect(axis, value, first, Mean.of(finite), len(changes) - len(finite)))
    return found


def _key(axes: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(axes.items())


def _changes(before: Point, after: Point) -> list[float]:
    """Of each seed that both ended, per cent; not finite where one diverged."""
    losses = [(before.outcomes[seed].loss, after.outcomes[seed].loss)
              for seed in before.outcomes.keys() & after.outcomes.keys()]
    return [100.0 * (new - old) / abs(old) if math.isfinite(old) else math.inf
            for old, new in losses if old and not (math.isnan(old) or math.isnan(new))]
