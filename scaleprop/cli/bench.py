"""``scaleprop bench``: recipes against float32, on the model's example inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from scaleprop.analysis.recipes import EAGER, cosine
from scaleprop.analysis.timing import interleaved_medians
from scaleprop.api import Calibration, CompiledModel, compile, split_example, stored_bytes
from scaleprop.calibration.feed import refuse_bare
from scaleprop.cli.models import Subject
from scaleprop.errors import ConfigError
from scaleprop.recipes import Recipe, named_recipe

FLOAT32 = Recipe(name="float32", description="nothing is quantized", roles={})


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant. ``speedup`` and ``size_ratio`` are against eager float32.

    nbytes: of parameters and buffers. cosine: of all float outputs, to eager float32.
    """

    name: str
    milliseconds: float
    speedup: float
    nbytes: int
    size_ratio: float
    cosine: float


def bench(
    subject: Subject, recipes: Sequence[str], backend: str, seconds: float,
    calibration: Calibration | None = None, **options: Any,
) -> list[Row]:
    """Rows for the eager model, the backend without quantization, and each recipe.

    options: further arguments of ``scaleprop.compile``.

    Raises:
        ConfigError: where two recipes have the same name.
    """
    plans = [FLOAT32, *map(named_recipe, recipes)]
    names = [plan.name for plan in plans]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"two recipes are named {twice[0]!r}; each is measured once")
    refuse_bare(calibration)
    if calibration is not None and not callable(calibration):
        calibration = list(calibration)  # every recipe reads it; a generator can be read once
    args, kwargs = split_example(subject.inputs)
    model = subject.model
    eager = model.module() if isinstance(model, ExportedProgram) else model.eval()
    compiled: dict[str, CompiledModel] = {}
    for plan in plans:
        compiled[f"{backend} {plan.name}"] = compile(
            model, subject.inputs, plan, backend, calibration=calibration, **options)
    calls: dict[str, Callable[[], Any]] = {EAGER: lambda: eager(*args, **kwargs)}
    calls |= {name: (lambda m=m: m(*args, **kwargs)) for name, m in compiled.items()}
    with torch.no_grad():
        expected = calls[EAGER]()
        cosines = {name: cosine(call(), expected) for name, call in calls.items()}
        times = interleaved_medians(calls, seconds)
    before = stored_bytes(eager)
    sizes = {EAGER: before, **{name: m.nbytes for name, m in compiled.items()}}
    return [
        Row(name, 1e3 * time, times[EAGER] / time, sizes[name], sizes[name] / before,
            cosines[name])
        for name, time in times.items()
    ]
