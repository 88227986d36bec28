"""Compile a model that is larger than memory, from the safetensors files it is stored in.

The graph is captured from parameters that have shapes alone. A parameter is read when a pass, or a
node that runs, computes with it, and dropped after; what it becomes goes to a file beside the
destination. So there are at most two layers in memory, and a killed compilation goes on where it
was. The result is that of ``compile`` and ``save``, bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop import durable, memory, storage
from scaleprop.api import AUTO, Calibration, report_of, stored_bytes
from scaleprop.backends.registry import backend_named
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import ConfigError
from scaleprop.passes.base import PassManager, Program
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes import Recipe, named_recipe
from scaleprop.report import Report
from scaleprop.signature import Signature, split_example
from scaleprop.streaming.checkpoint import Checkpoint
from scaleprop.streaming.shelf import FolderShelf
from scaleprop.streaming.skeleton import fake, fill, from_config, from_factory

logger = logging.getLogger(__name__)

_NOT_LOWERED = ("compiled from files, one layer at a time: no backend has run it; scaleprop.load "
                "lowers it, and its verify() compares it with the reference")


@memory.returned()
def compile_from_safetensors(
    directory: str | Path,
    out: str | Path,
    example_inputs: Any = None,
    recipe: str | Recipe = "int8-dynamic",
    backend: str = "onnxruntime",
    *,
    model: Callable[[], Any] | None = None,
    calibration: Calibration | None = None,
    dynamic_shapes: Any = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    passes: Sequence[str] = (),
    ignore: Sequence[str] = (),
    shard_bytes: int = storage.SHARD_BYTES,
    progress: bool = False,
) -> Report:
    """Write to ``out`` what ``compile(model, …).save(out)`` would, with one layer in memory.

    What a killed or failed call had done is kept in a hidden folder beside ``out``, found by the
    next call, and deleted at the end. No backend sees the model: operators that it cannot run are
    refused by ``load``, and the report names no kernels.

    Args:
        directory: has ``*.safetensors``, with an index or without, and a transformers
            ``config.json`` unless ``model`` is given.
        out: a folder for ``scaleprop.load``; an older saved model there is replaced.
        example_inputs: as for ``compile``; default: what the factory returns, or the model's own
            ``dummy_inputs``. They, and every calibration batch, run through the graph node by node.
        backend: what ``load`` lowers to.
        model: a function without arguments that returns the module, or (module, example inputs).
            Parameters go to the meta device as they are made, and must have the files' names,
            shapes and dtypes.
        recipe, calibration, dynamic_shapes, exclude, include, passes: as for ``compile``; passes
            that need several whole weights at once, and compensated rounding, are refused.
        ignore: shell patterns of names that the files may have and the model has not.
        shard_bytes: of one file of ``out``, at most.
        progress: show progress on standard error.

    Raises:
        ConfigError: before anything is written: files that do not fit the model, naming tensors;
            passes that cannot work one weight at a time; ``out`` holds something else.
        As ``compile``: for what cannot be captured, calibrated or rewritten.
    """
    target = Path(out)
    if recipe == AUTO:
        raise ConfigError("recipe='auto' tries transforms on whole models. Remedy: name a recipe; "
                          "or compile() where the model fits into memory")
    plan = named_recipe(recipe)
    backend_named(backend)
    storage.check_replaceable(target)
    target = target.resolve()
    manager = build(plan, exclude=exclude, include=include, calibration=calibration, extra=passes,
                    progress=progress)
    _refuse_several(manager, plan)
    program, count = _captured(Path(directory), model, example_inputs, dynamic_shapes, ignore)
    storage.make_parents(target)
    with durable.scratch(target, "compiling", keep=True) as folder:
        with progress_bar(progress, count, "quantizing") as update:
            made = _run(program, manager, FolderShelf(folder, update), plan, backend)
        storage.save(made, target, shard_bytes)
        report = report_of(made)  # reads sizes alone: what it counts is deleted next
    return dataclasses.replace(report, notes=(*report.notes, _NOT_LOWERED))


def _captured(
    source: Path, model: Callable[[], Any] | None, example_inputs: Any, dynamic_shapes: Any,
    ignore: Sequence[str],
) -> tuple[Program, int]:
    """The graph, whose parameters are the files' tensors; and how many of them are no vectors."""
    checkpoint = Checkpoint.open(source)
    module, inputs = from_config(source, checkpoint.dtype) if model is None \
        else from_factory(model)
    tensors = checkpoint.assigned(module, ignore)
    if example_inputs is None and inputs is None:
        raise ConfigError("there are no example inputs. Remedy: pass example_inputs= (--inputs "
                          "package.module:function)")
    args, kwargs = split_example(inputs if example_inputs is None else example_inputs)
    fake(module)
    program = capture(module, args, kwargs, dynamic_shapes)
    del module
    fill(program.module, tensors)
    Signature.of(program).flatten(args, kwargs)
    return program, sum(t.ndim > 1 for t in {id(t): t for t in tensors.values()}.values())


def _run(
    program: Program, manager: PassManager, shelf: FolderShelf, recipe: Recipe, backend: str
) -> storage.SavedModel:
    """What the passes make of ``program``, with the outputs that it had before them."""
    with torch.no_grad():
        output = program.module(*program.example_args, **program.example_kwargs)
    nbytes_before = stored_bytes(program.module)
    compiled = manager.run(program.replace(shelf=shelf))
    logger.info("%d weights were done already", shelf.reused)
    return storage.SavedModel(
        program=compiled, recipe=recipe, backend=backend,
        baseline=tuple(pytree.tree_leaves(output)), nbytes_before=nbytes_before)


def _refuse_several(manager: PassManager, recipe: Recipe) -> None:
    """Raise ``ConfigError`` for what cannot be done one weight at a time."""
    remedy = "or compile() where the model fits into memory"
    for step in manager.passes:
        if not step.one_by_one:
            raise ConfigError(f"pass {step.name!r} needs several whole weights at once. Remedy: "
                              f"leave it out; {remedy}")
        moments = step.moments if isinstance(step, Calibrate) else False
        rounding = step.rounding if isinstance(step, QuantizeWeights) else "nearest"
        if moments or rounding == "compensated" or (rounding is None and recipe.compensates):
            raise ConfigError(f"recipe {recipe.name!r}, pass {step.name!r}: compensated rounding "
                              "needs a second moment for every weight at once. Remedy: "
                              f"passes=['quantize-weights{{rounding=nearest}}']; {remedy}")
