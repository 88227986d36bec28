"""Measures, every so many steps, what low precision does to a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch

from scaleprop.backends.dynamo import Report
from scaleprop.errors import ConfigError
from scaleprop.monitors.measures import Seen, Weight, compared, measured
from scaleprop.monitors.plots import plot_scales
from scaleprop.monitors.records import GradientRecord, Measurement, OperandRecord
from scaleprop.monitors.watching import LossFn, Twin
from scaleprop.monitors.writers import Writer
from scaleprop.passes.training.solved import solved
from scaleprop.recipes.training_named import training_recipe
from scaleprop.training import scale_report, training_options, training_state


def _output(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The loss that a model returns."""
    return model(*args, **kwargs)


class Monitor:
    """Measures every ``every``-th step of a model that was given to ``prepare_training``.

        monitor = scaleprop.Monitor(model, every=100, writers=[CsvWriter("run.csv")])
        for batch in data:
            model(*batch).backward()
            monitor.step(*batch)
            optimizer.step()
            optimizer.zero_grad()
        monitor.plot("scales.svg")

    A measured step runs ``loss_fn`` twice more, forward and backward, operator by operator: in the
    recipe's precision, with the random numbers and carried amax of the step just made, and in the
    parameters' own. Training goes on as if it had not: no ``.grad``, buffer, random number, step
    count or amax changes. Hooks on modules and tensors do run. Steps between cost a comparison.
    Before ``optimizer.step()`` what is measured is what the step computed; after it, the same
    batch with the new weights. ``records``: every measurement so far.
    """

    def __init__(
        self, model: torch.nn.Module, *, every: int = 100, writers: Sequence[Writer] = (),
        loss_fn: LossFn = _output, start: int = 0,
    ) -> None:
        """Args:
            every: measured are the steps that it divides.
            writers: given each measurement as it is made.
            loss_fn: (model, *batch) → the loss, a scalar; by default what the model returns.
            start: how many steps were made before, in a run that is resumed.

        Raises:
            ConfigError: where ``model`` was not prepared, its recipe has no operands in formats
                of scales, or an argument is out of range.
        """
        options, _ = training_options(model)
        recipe = training_recipe(options.recipe)
        if every < 1 or start < 0:
            raise ConfigError(f"every={every}, start={start}: at least 1, and at least 0")
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn={loss_fn!r}: a function of (model, *batch)")
        formats = solved(recipe)
        if not (recipe.operands or recipe.phases) or (formats and formats.x == "bf16"):
            raise ConfigError(f"recipe {recipe.name!r} quantizes nothing that a monitor measures. "
                              "Remedy: one that quantizes operands, see scaleprop recipes "
                              "--training")
        self.every, self.steps, self.writers = every, start, list(writers)
        self.records: list[Measurement] = []
        self._model, self._loss_fn, self._recipe = model, loss_fn, options.recipe
        self._run: Report | None = None  # of the graph that the run began with
        self._made: Twin | None = None
        self._weights: dict[str, Weight] = {}

    def step(self, *args: Any, **kwargs: Any) -> Measurement | None:
        """Count a step; measure it, on this batch, where ``every`` divides its number.

        Raises:
            ConfigError: as ``measure``.
        """
        self.steps += 1
        return None if self.steps % self.every else self.measure(*args, **kwargs)

    def measure(self, *args: Any, **kwargs: Any) -> Measurement:
        """Measure now; args are what ``loss_fn`` is given after the model.

        Raises:
            ConfigError: where nothing is quantized, the loss is no scalar, exponents are to be
                fixed by a first batch yet, or the model was prepared anew with another recipe.
        """
        if training_options(self._model)[0].recipe != self._recipe:
            raise ConfigError("the model was prepared with another recipe since. Remedy: a new "
                              "Monitor after prepare_training")
        found: dict[tuple[str, str], OperandRecord] = {}

        def see(seen: Seen) -> None:
            record, weight = measured(seen, self._weights.get(seen.layer))
            found[seen.layer, seen.role] = record
            if weight is not None:
                weights[seen.layer] = weight

        weights: dict[str, Weight] = {}
        gradients = self._twin().gradients(training_state(self._model), see, self._loss_fn, args,
                                         kwargs)
        if not found and self._recipe_acts:
            raise ConfigError("no product of the model is quantized: model.scale_report() says "
                              "why. Remedy: a recipe without high=('head',), or a larger model")
        self._weights.update(weights)
        return self._written(Measurement(
            step=self.steps, operands=tuple(found.values()),
            gradients=tuple(GradientRecord(parameter=name, cosine=cosine, norm_ratio=ratio)
                            for name, pair in gradients.items()
                            for cosine, ratio in (compared(*pair),))))

    def _twin(self) -> Twin:
        """Of the run as it is now: one whose exponents were found anew has another."""
        begun = next(iter(scale_report(self._model)), None)
        if begun is None and solved(training_recipe(self._recipe)) is not None:
            raise ConfigError("the model was not called yet: its first batch fixes exponents. "
                              "Remedy: monitor.step(*batch) after a step")
        if self._made is None or begun is not self._run:
            options, dynamic = training_options(self._model)
            self._run = begun
            self._made = Twin(self._model, training_recipe(options.recipe), options.seed,
                              lambda: scale_report(self._model), dynamic)
        return self._made

    @property
    def _recipe_acts(self) -> bool:
        """Whether the recipe has operands at every step: a phase may take them all out."""
        recipe = training_recipe(self._recipe)
        return all(recipe.at(start) for start in (0, *(phase.start for phase in recipe.phases)))

    def _written(self, measurement: Measurement) -> Measurement:
        self.records.append(measurement)
        for writer in self.writers:
            writer.write(measurement)
        return measurement

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw how the exponents of scales are distributed, role by role, over the run: see
        ``plot_scales``."""
        plot_scales(self.records, path)

    def close(self) -> None:
        """Close the writers."""
        for writer in self.writers:
            writer.close()
