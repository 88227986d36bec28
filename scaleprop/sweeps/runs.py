"""One run: a model trained by one recipe from one seed, in this process or another."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from scaleprop import _torch_compat as compat
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.sweeps.settings import Settings
from scaleprop.training import prepare_training

Status = Literal["running", "done", "diverged", "failed"]
_TAIL = 10  # a run's loss is the mean of the last tenth of its steps
# hears of steps done, and the last loss
Listener = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run gave.

    losses: of every step. validation: the mean loss of held-out batches. seconds_per_step: the
    median, compilation apart. error: the traceback of a failed run.
    """

    status: Status
    losses: tuple[float, ...] = ()
    validation: float | None = None
    seconds_per_step: float | None = None
    error: str = ""

    @property
    def loss(self) -> float:
        """What recipes are compared by: the validation loss, else the mean of the last tenth of
        training; infinite where training diverged, NaN where there is none."""
        if self.status == "diverged":
            return math.inf
        if self.status != "done":
            return math.nan
        if self.validation is not None:
            return self.validation
        return statistics.fmean(self.losses[-max(len(self.losses) // _TAIL, 1):])


@dataclasses.dataclass(frozen=True)
class Task:
    """One run to do, as it travels to another process.

    threads: of a process that does nothing else; None leaves this one as it is.
    """

    key: str
    axes: Mapping[str, str]
    recipe: TrainingRecipe
    seed: int
    threads: int | None = None


def perform(settings: Settings, task: Task, listener: Listener | None = None) -> Outcome:
    """Run ``task``. Errors of the user's code are part of the outcome."""
    if task.threads is not None:
        compat.use_threads(task.threads)
    with contextlib.ExitStack() as stack:
        if task.threads is None:  # the caller's random numbers stay what they were
            stack.enter_context(torch.random.fork_rng())
        else:
            stack.callback(torch.compiler.reset)  # or compiled graphs pile up
        try:
            return _trained(settings, task, listener)
        except Exception as error:  # noqa: BLE001
            return Outcome("failed", error="".join(traceback.format_exception(error)))


def _trained(settings: Settings, task: Task, listener: Listener | None) -> Outcome:
    options: dict[str, Any] = {"seed": task.seed, **settings.options}
    model = prepare_training(settings.model(task.seed), task.recipe, **options)
    optimizer, schedule = _optimizer(settings, model)
    torch.manual_seed(task.seed)  # dropout's, whatever the factory drew
    model.train()
    losses: list[float] = []
    times: list[float] = []
    for batch in settings.batches(task.seed):
        started = time.perf_counter()
        loss = settings.loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            return Outcome("diverged", tuple(losses), None, statistics.median(times))
        if listener is not None:
            listener(len(losses), losses[-1])
    validation = _validated(settings, model)
    status: Status = "done" if validation is None or math.isfinite(validation) else "diverged"
    return Outcome(status, tuple(losses), validation, statistics.median(times))


def _optimizer(settings: Settings, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer, and its learning rate schedule or None."""
    make = settings.function("optimizer")
    if make is None:
        return torch.optim.AdamW(model.parameters(), lr=settings.learning_rate), None
    made = make(model)
    return made if isinstance(made, tuple) else (made, None)


def _validated(settings: Settings, model: torch.nn.Module) -> float | None:
    """The mean loss of the validation batches, in the recipe's forward pass.

    Gradients stay on: the training graph runs again, and no second one is compiled, which would
    take half as long as the first; unless the model reads whether it is training.
    """
    validation = settings.function("validation")
    if validation is None:
        return None
    model.eval()
    losses = [float(settings.loss_of(model, batch).detach()) for batch in validation()]
    if not losses:
        raise ConfigError("validation returned no batch")
    return statistics.fmean(losses)
