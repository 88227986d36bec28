"""Several recipes of one model, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from scaleprop.analysis.timing import interleaved_medians
from scaleprop.api import CompiledModel, compile
from scaleprop.calibration.feed import refuse_bare
from scaleprop.errors import ConfigError
from scaleprop.recipes import Recipe
from scaleprop.report import Report, Variant
from scaleprop.signature import split_example

EAGER = "eager float32"


def compare_recipes(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    recipes: Sequence[str | Recipe],
    backend: str = "onnxruntime",
    *,
    seconds: float = 5.0,
    calibration: Any = None,
    **options: Any,
) -> tuple[Report, tuple[CompiledModel, ...]]:
    """Compile ``model`` by each of ``recipes``, and compare size, speed and fidelity.

    seconds: how long to time them, interleaved, against the eager model; 0: not at all.
    options: further arguments of ``compile``.

    Returns:
        The first recipe's report, with ``variants``; and the models, in the recipes' order.

    Raises:
        ConfigError: without recipes, or where two have the same name; and as ``compile``.
    """
    refuse_bare(calibration)
    if calibration is not None and not callable(calibration):
        calibration = list(calibration)  # every recipe reads it; a generator can be read once
    compiled: dict[str, CompiledModel] = {}
    for recipe in recipes:
        one = compile(model, example_inputs, recipe, backend, calibration=calibration, **options)
        if one.recipe.name in compiled:
            raise ConfigError(f"two recipes are named {one.recipe.name!r}; each is shown once")
        compiled[one.recipe.name] = one
    if not compiled:
        raise ConfigError("there are no recipes to compare")
    args, kwargs = split_example(example_inputs)
    eager: Any = model.module() if isinstance(model, ExportedProgram) else model.eval()
    calls: dict[str, Callable[[], Any]] = {EAGER: lambda: eager(*args, **kwargs)}
    calls |= {name: (lambda m=m: m(*args, **kwargs)) for name, m in compiled.items()}
    with torch.no_grad():
        expected = calls[EAGER]()
        cosines = {name: cosine(calls[name](), expected) for name in compiled}
        times = interleaved_medians(calls, seconds) if seconds > 0 else {}
    variants = tuple(
        Variant(recipe=name, backend=one.backend, nbytes=one.nbytes,
                size_ratio=one.nbytes / one.nbytes_before if one.nbytes_before else None,
                speed=times[EAGER] / times[name] if times else None,
                fidelity={**({} if one.fidelity is None else dataclasses.asdict(one.fidelity)),
                          "cosine": cosines[name]})
        for name, one in compiled.items())
    first = next(iter(compiled.values()))
    return first.report.with_variants(variants), tuple(compiled.values())


def cosine(actual: Any, expected: Any) -> float:
    """Of all finite float outputs of two calls, as one vector each; 1 where both are zero."""
    pairs = [
        (a.double().flatten(), e.double().flatten())
        for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
        if isinstance(e, torch.Tensor) and e.is_floating_point()
    ]
    if not pairs:
        return math.nan
    a, e = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    keep = e.isfinite()
    a, e = a[keep], e[keep]
    norms = float(a.norm() * e.norm())
    return float(a @ e) / norms if norms else 1.0
