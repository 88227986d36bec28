"""What a sweep found: gaps to the baseline, what they cost, and which combinations are worth it."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scaleprop.errors import ConfigError
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.report.files import write_text
from scaleprop.sweeps.overhead import Overhead
from scaleprop.sweeps.runs import Outcome
from scaleprop.sweeps.store import Store, key_of

if TYPE_CHECKING:
    from scaleprop.sweeps.effects import Effect

_NUMBERS = ("loss", "loss_error", "gap", "gap_error", "gap_percent", "overhead", "operands",
            "passes", "rotations", "seconds_per_step")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over ``count`` seeds; error: its standard error, NaN of fewer than two. Without any,
    the mean is NaN; infinite where one diverged."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        found = list(values)
        if not found:
            return cls(math.nan, math.nan, 0)
        if not all(map(math.isfinite, found)):
            return cls(sum(found), math.nan, len(found))
        error = (statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan)
        return cls(statistics.fmean(found), error, len(found))


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination and its runs.

    outcomes: by seed, of the runs there are. loss: over seeds; gap: of the loss less that of the
    baseline's run from the same seed, over the seeds that both have. percent: the gap, of the
    baseline's loss. overhead: None for a model without linear layers.
    """

    axes: Mapping[str, str]
    recipe: TrainingRecipe
    overhead: Overhead | None
    outcomes: Mapping[int, Outcome]
    loss: Mean
    gap: Mean
    percent: float

    @property
    def cost(self) -> float:
        """``overhead.relative``: of BF16; NaN where it is not known."""
        return math.nan if self.overhead is None else self.overhead.relative

    @property
    def seconds_per_step(self) -> float:
        """The median over seeds, of this machine's emulation: no measure of hardware."""
        found = [each.seconds_per_step for each in self.outcomes.values()
                 if each.seconds_per_step is not None]
        return statistics.median(found) if found else math.nan

    def status(self, seeds: Sequence[int]) -> str:
        """``3 of 3``; and how many diverged or failed, are in progress or missing."""
        kinds = [self.outcomes[seed].status if seed in self.outcomes else "missing"
                 for seed in seeds]
        others = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds) if kind != "done"]
        return ", ".join([f"{kinds.count('done')} of {len(seeds)}", *others])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The combinations of a sweep, in the order of the grid.

    skipped: (axes, reason) of those that are no valid recipe. settings: what all runs share.
    """

    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    baseline: Point | None
    points: tuple[Point, ...]
    skipped: tuple[tuple[Mapping[str, str], str], ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sweep:
        """What a file has, while it is being run too: the grid that was asked for last.

        Raises:
            ConfigError: where there is none, or it is no sweep.
        """
        store = Store(path, write=False)
        try:
            return cls.of(store)
        finally:
            store.close()

    @classmethod
    def of(cls, store: Store) -> Sweep:
        """What an open file has."""
        settings, plan = store.stored()
        outcomes, seeds = store.outcomes(), tuple(plan["seeds"])

        def runs(entry: Mapping[str, Any]) -> dict[int, Outcome]:
            recipe = TrainingRecipe.from_dict(entry["recipe"])
            keys = {seed: key_of(settings, recipe, seed) for seed in seeds}
            return {seed: outcomes[key] for seed, key in keys.items() if key in outcomes}

        base = plan["baseline"]
        reference = {} if base is None else runs(base)
        valid = [entry for entry in plan["combinations"] if entry["recipe"] is not None]
        return cls(
            settings, seeds, None if base is None else _point(base, reference, reference),
            tuple(_point(entry, runs(entry), reference) for entry in valid),
            tuple((entry["axes"], entry["reason"]) for entry in plan["combinations"]
                  if entry["recipe"] is None))

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes."""
        every = [point.axes for point in self.points] + [axes for axes, _ in self.skipped]
        return tuple(dict.fromkeys(itertools.chain.from_iterable(every)))

    def merit(self, point: Point) -> float:
        """What is to be small: the gap, or the loss of a sweep without a baseline."""
        return (point.loss if self.baseline is None else point.gap).value

    def ranked(self) -> list[Point]:
        """The points, smallest gap first; what diverged and what has no runs yet is last."""
        return sorted(self.points, key=lambda point: (math.isnan(merit := self.merit(point)),
                                                      merit))

    def pareto(self) -> list[Point]:
        """The points that no other one beats in gap and in cost, cheapest first. Points that are
        equal in both do not beat each other.

        Raises:
            ConfigError: where the model has no linear layers, whose cost could be counted.
        """
        found = [point for point in self.points if math.isfinite(self.merit(point))]
        if any(point.overhead is None for point in self.points):
            raise ConfigError("the cost of recipes is not known: the model has no linear layers")
        front: list[Point] = []
        least = math.inf
        found.sort(key=lambda point: (point.cost, self.merit(point)))
        for _, group in itertools.groupby(found, key=lambda point: point.cost):
            alike = list(group)
            best = self.merit(alike[0])
            if best < least:
                front += [point for point in alike if self.merit(point) == best]
                least = best
        return front

    def effects(self, within: Mapping[str, str] | None = None) -> list[Effect]:
        """What each value of an axis does, the others alike; ``within``: axis → value, among the
        combinations that have it, to see whether one choice depends on another.

        Raises:
            ConfigError: where none has.
        """
        from scaleprop.sweeps.effects import effects

        return effects(self, within)

    def errors(self) -> list[tuple[Point, int, str]]:
        """(point, seed, traceback) of failed runs."""
        every = ([self.baseline] if self.baseline else []) + list(self.points)
        return [(point, seed, outcome.error) for point in every
                for seed, outcome in point.outcomes.items() if outcome.status == "failed"]

    def table(self) -> str:
        """Markdown, smallest gap first; see ``show`` for the terminal."""
        from scaleprop.sweeps.tables import markdown

        return markdown(self)

    def show(self) -> None:
        """Print a table.

        Raises:
            BackendUnavailable: without rich.
        """
        from scaleprop.sweeps.tables import show

        show(self)

    def plot(self, path: str | os.PathLike[str], *, color: str | None = None) -> None:
        """Draw gaps over costs: ``.svg`` or ``.png``; or ``.html``, one page with the table.

        color: the axis whose values have a colour each; the first unless it is given.

        Raises:
            ConfigError: for another suffix or an unknown axis, or a path that cannot be written.
            BackendUnavailable: without matplotlib; an HTML page does without.
        """
        from scaleprop.sweeps.picture import plot

        plot(self, path, color)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a row per combination: the baseline first, skipped ones last.

        Raises:
            ConfigError: where ``path`` cannot be written.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("kind", *self.axes, "recipe", *_NUMBERS, "runs", "reason"))
        if self.baseline is not None:
            rows.writerow(self._row("baseline", self.baseline))
        for point in self.points:
            rows.writerow(self._row("combination", point))
        for axes, reason in self.skipped:
            rows.writerow(("skipped", *(axes.get(axis, "") for axis in self.axes), "",
                           *("" for _ in _NUMBERS), "", reason))
        write_text(path, text.getvalue())

    def _row(self, kind: str, point: Point) -> tuple[str, ...]:
        numbers = self.numbers(point)
        return (kind, *(point.axes.get(axis, "") for axis in self.axes), point.recipe.name,
                *("" if value is None else repr(value) for value in numbers.values()),
                point.status(self.seeds), "")

    def numbers(self, point: Point) -> dict[str, float | None]:
        """The columns of a point; None where there is nothing to say."""
        cost = point.overhead
        found = (point.loss.value, point.loss.error, point.gap.value, point.gap.error,
                 point.percent, point.cost,
                 *((math.nan,) * 3 if cost is None else
                   (cost.operands, cost.passes, cost.rotations)), point.seconds_per_step)
        return {name: None if math.isnan(value) else value
                for name, value in zip(_NUMBERS, found, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no infinity: what diverged has no numbers."""

        def entry(point: Point) -> dict[str, Any]:
            numbers = {name: value if value is None or math.isfinite(value) else None
                       for name, value in self.numbers(point).items()}
            return {"axes": dict(point.axes), "recipe": point.recipe.name, **numbers,
                    "runs": point.status(self.seeds)}

        effects = [{**dataclasses.asdict(each), "percent": each.percent.value,
                    "error": each.percent.error, "pairs": each.percent.count}
                   for each in self.effects() if each.percent.count]
        known = bool(self.points) and all(point.overhead for point in self.points)
        return {
            "settings": dict(self.settings), "seeds": list(self.seeds),
            "baseline": None if self.baseline is None else entry(self.baseline),
            "combinations": [entry(point) for point in self.points],
            "pareto": [dict(point.axes) for point in self.pareto()] if known else None,
            "effects": [{name: None if value != value else value for name, value in each.items()}
                        for each in effects],
            "skipped": [{"axes": dict(axes), "reason": reason} for axes, reason in self.skipped]}


def _point(
    entry: Mapping[str, Any], outcomes: Mapping[int, Outcome], reference: Mapping[int, Outcome]
) -> Point:
    cost = entry["overhead"]
    ended = {seed: each.loss for seed, each in outcomes.items() if not math.isnan(each.loss)}
    against = {seed: each.loss for seed, each in reference.items() if math.isfinite(each.loss)}
    both = sorted(ended.keys() & against.keys())
    gap = Mean.of(ended[seed] - against[seed] for seed in both)
    base = Mean.of(against[seed] for seed in both)
    return Point(
        entry["axes"], TrainingRecipe.from_dict(entry["recipe"]),
        None if cost is None else Overhead(**cost), outcomes, Mean.of(ended.values()), gap,
        100 * gap.value / abs(base.value) if base.value else math.nan)
