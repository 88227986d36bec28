"""The face: ``compile`` a model, call it, export it, save it, load it."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from scaleprop import storage
from scaleprop.analysis.blocks import block_for_report
from scaleprop.analysis.compiled import look_at_compiled
from scaleprop.analysis.origin import Origin, readers_of, with_effects
from scaleprop.backends.base import Executable
from scaleprop.backends.registry import backend_named
from scaleprop.errors import ConfigError
from scaleprop.fidelity import Fidelity, compare
from scaleprop.passes.base import PassManager, Program
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import Recipe, named_recipe
from scaleprop.report import Report, ScaleReport
from scaleprop.signature import Signature, split_example
from scaleprop.storage import Known

if TYPE_CHECKING:
    from scaleprop.backends.onnxruntime import OnnxRuntimeBackend
    from scaleprop.report.graph import Block

logger = logging.getLogger(__name__)

Calibration = Iterable[Any] | Callable[[Any], Any]

AUTO = "auto"  # a recipe's name that is none: the formats of ``target``, with the best transforms


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """A model in low precision. Call it as the model it was made from.

    program: the scaled graph; recipe: what it was made with; backend: where it runs.
    baseline: the unquantized model's flat outputs on the example inputs, for verification.
    fidelity: what ``compile(verify=True)`` measured; None without. It is not saved.
    origin: what transforms are compared with; None where there were none. It is not saved.
    scales, block: values through depth, and a picture of one block, of a model that was measured
    before it was saved.
    progress: whether to show progress on standard error where the report measures.
    """

    program: Program
    recipe: Recipe
    backend: str
    signature: Signature
    executable: Executable
    baseline: tuple[Any, ...]
    nbytes_before: int
    fidelity: Fidelity | None = None
    origin: Origin | None = dataclasses.field(default=None, repr=False, compare=False)
    scales: ScaleReport | None = dataclasses.field(default=None, repr=False)
    block: Block | None = dataclasses.field(default=None, repr=False)
    progress: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on inputs shaped as the example inputs; returns the model's own output structure.

        Raises:
            ConfigError: where an argument is missing or has the wrong type, dtype or shape.
        """
        leaves = self.executable(self.signature.flatten(args, kwargs))
        return pytree.tree_unflatten(leaves, self.program.out_spec)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers, as stored in their formats."""
        return stored_bytes(self.program.module)

    @property
    def report(self) -> Report:
        """What happened to every tensor, who decided it, and why.

        ``measured``, ``save`` and ``to_dict`` add what the numbers are: for that the model runs on
        the reference and the example inputs when they are first called; once, and once more for
        scales that are found at run time.
        """
        lowerings = self.executable.lowerings
        records = tuple(
            dataclasses.replace(record, lowering=lowerings.get(record.node, record.lowering))
            for record in self.known.records
        )
        fidelity = {} if self.fidelity is None else dataclasses.asdict(self.fidelity)
        measure = self._measured if self.known.scales is None else None
        return dataclasses.replace(report_of(self), records=records, fidelity=fidelity,
                                   measure=measure)

    def graph_view(self, block: str | None = None, depth: int | None = None) -> Block:
        """A picture of one block, with scales on its edges: ``.save("block.svg")``.

        Dynamic scales are measured on the example inputs.

        Args:
            block: a module's path; "" for the whole model; None for the most typical block.
            depth: levels of modules below the block that are drawn operator by operator; deeper
                modules are one box each. None: all levels.

        Raises:
            ConfigError: where no operator is in a module of this path, naming those that are.
        """
        from scaleprop.analysis.graph_view import program_block

        return program_block(self.program, block, depth, f"{self.recipe.name}, {self.backend}")

    @property
    def known(self) -> Known:
        """Records and transforms with all that was measured so far; ``save`` keeps that."""
        if "_numbers" in self.__dict__:  # what functools.cached_property fills
            return self._numbers
        return Known(self.program.records, self.program.transforms, self.scales, self.block)

    @functools.cached_property
    def _numbers(self) -> Known:
        """What one run tells; see ``analysis.compiled``."""
        if self.scales is not None:
            return Known(self.program.records, self.program.transforms, self.scales, self.block)
        readers = readers_of(self.program.transforms)
        name = f"the model, as {self.recipe.name}"
        found = look_at_compiled(self.program, name, readers, self.progress)
        transforms = with_effects(self.program, self.origin, found)
        return Known(found.records, transforms, found.scales, block_for_report(self.graph_view))

    def _measured(self, report: Report) -> Report:
        """``report`` with what ``_numbers`` has of its records."""
        known = self._numbers
        found = {(one.node, one.operand, one.role): one for one in known.records}
        records = tuple(
            dataclasses.replace(found.get((one.node, one.operand, one.role), one),
                                lowering=one.lowering) for one in report.records)
        return dataclasses.replace(report, records=records, transforms=known.transforms,
                                   scales=report.scales or known.scales, block=known.block,
                                   measure=None)

    def verify(self) -> Fidelity:
        """Compare this backend with the reference on the example inputs.

        Raises:
            MismatchError: where a node or an output differs by more than its bound.
        """
        backend_named(self.backend).verify(self.program)
        leaves = self.program.example_leaves
        reference = backend_named("reference").lower(self.program)
        return compare(self.executable(leaves), reference(leaves), self.baseline, self.backend)

    def export(
        self, path: str | Path, external_data: bool | None = None, check: bool = True
    ) -> Path:
        """Write an ONNX file, load it, run it and compare it with the reference, node by node.

        The file is written beside its destination and renamed, so an interrupted or failing
        export leaves nothing behind. ``external_data``: weights in ``<path>.data``; by default
        when they are large. ``check=False`` only writes. The file's metadata has the recipe's name
        as ``scaleprop.recipe``, and as ``scaleprop.records`` format, scale and reason of every
        tensor.

        Raises:
            ConfigError: where ``path`` does not end in ``.onnx`` or cannot be written.
            LoweringError: where a node has no faithful ONNX form.
            MismatchError: where the written file differs from the reference beyond the bound.
            BackendUnavailable: where onnx or onnxruntime is missing.
        """
        exporter = cast("OnnxRuntimeBackend", backend_named("onnxruntime"))
        metadata = {"recipe": self.recipe.name}
        return exporter.export(self.program, path, external_data, metadata, check)

    def save(self, directory: str | Path, shard_bytes: int = storage.SHARD_BYTES) -> Path:
        """Write JSON and safetensors files with their checksums to ``directory``, see ``storage``.

        The folder is written beside its destination and takes its place when it is complete; what a
        killed ``save`` of the same model had finished is not written again. ``shard_bytes``: of one
        safetensors file, at most.

        Raises:
            ConfigError: where ``directory`` holds anything but a saved model, or cannot be written.
            UnsupportedOpError: where the graph holds what JSON cannot name.
        """
        return storage.save(self, Path(directory), shard_bytes)

    def save_pretrained(
        self, directory: str | Path, like: torch.nn.Module, *, tokenizer: Any = None,
        max_shard_size: int | str = "5GB", check: bool = True,
    ) -> Path:
        """Write a folder for ``transformers`` and vLLM: weights as compressed-tensors.

        Codes and scales of linears are this model's, bit for bit; so are parameters that transforms
        changed. Embeddings and convolutions are written decoded, which loses nothing.

        Args:
            directory: new, empty, or one that this wrote; it is complete or not there.
            like: the transformers model that was compiled. Its configuration, and parameters that
                the graph does not read, are written along.
            tokenizer: anything with ``save_pretrained``; else the tokenizer's files of the folder
                that ``like`` was loaded from are copied.
            max_shard_size: bytes of a safetensors file, or text such as ``"5GB"``.
            check: compare ``like`` with the written parameters to this model on the example inputs,
                activations unquantized.

        Raises:
            ConfigError: where something does not fit (naming the tensor, and what does not), or
                ``like`` is another model, or the directory holds something else.
            BackendUnavailable: where transformers or safetensors is missing.
        """
        from scaleprop.interchange import writing

        return writing.save_pretrained(
            self, Path(directory), like, tokenizer=tokenizer, max_shard_size=max_shard_size,
            check=check)


def compile(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    recipe: str | Recipe = "int8-dynamic",
    backend: str = "onnxruntime",
    *,
    target: str | Recipe | None = None,
    calibration: Calibration | None = None,
    dynamic_shapes: Any = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    passes: Sequence[str] = (),
    verify: bool = False,
    progress: bool = False,
) -> CompiledModel:
    """Rewrite ``model`` to low precision and lower it to ``backend``. The model is not changed.

    Args:
        model: any module that ``torch.export`` can trace; it is captured in eval mode. Or what
            ``torch.export`` made of one: sizes then vary as it says.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or
            ``(args, kwargs)``. Batch and sequence sizes may vary afterwards where the model
            allows it.
        recipe: a name (see ``scaleprop recipes``), a path to a TOML or JSON file, or a ``Recipe``.
            ``auto`` tries chains of methods for the formats of ``target`` and takes the best for
            each region; it needs calibration, and ``report.trials`` says what each gave.
        backend: ``onnxruntime``, ``inductor``, ``reference`` or ``cuda``.
        target: with ``recipe="auto"``, the recipe whose formats are meant.
        calibration: an iterable of example inputs, or ``f(model)`` that runs the model; static
            recipes need it.
        dynamic_shapes: as ``torch.export.export`` takes it; overrides the default.
        exclude, include: what stays high, or the only things quantized: patterns over module
            paths and parameter names, or operator names such as ``aten.conv2d``.
        passes: more passes to run before quantization, as ``name{option=value}``.
        verify: check function-preserving passes in float64, and the backend against the
            reference; the report then has the numbers.
        progress: show progress on standard error.

    Raises:
        ConfigError, FormatError: recipe, backend or inputs that make no sense.
        CaptureError: where ``torch.export`` cannot trace the model.
        CalibrationError: where calibration is missing, empty or not finite.
        UnsupportedOpError, LoweringError: an operator that the backend cannot run.
        MismatchError: with ``verify``, where the backend differs from the reference.
    """
    args, kwargs = split_example(example_inputs)
    plan, chosen = _plan(recipe, target)
    backend_named(backend)  # a misspelt backend must not cost a capture
    captured = capture(model, args, kwargs, dynamic_shapes)
    Signature.of(captured).flatten(args, kwargs)  # tracing may have chosen other sizes
    manager = build(plan, exclude=exclude, include=include, calibration=calibration,
                    extra=[*passes, *chosen], verify=verify, progress=progress)
    return _compiled(captured, manager, plan, backend, verify, progress)


def _compiled(
    captured: Program, manager: PassManager, plan: Recipe, backend: str, verify: bool,
    progress: bool = False,
) -> CompiledModel:
    """A captured model, through the passes, lowered."""
    with torch.no_grad():
        output = captured.module(*captured.example_args, **captured.example_kwargs)
    nbytes_before = stored_bytes(captured.module)
    program = manager.run(captured)
    compiled = CompiledModel(
        program=program,
        recipe=plan,
        backend=backend,
        signature=Signature.of(program),
        executable=backend_named(backend).lower(program),
        baseline=tuple(pytree.tree_leaves(output)),
        nbytes_before=nbytes_before,
        origin=Origin.of(captured) if readers_of(program.transforms) else None,
        progress=progress,
    )
    if verify:
        compiled = dataclasses.replace(compiled, fidelity=compiled.verify())
        logger.info("%s: %s", backend, compiled.fidelity)
    return compiled


def from_pretrained(
    directory: str | Path, example_inputs: Any, backend: str = "onnxruntime", *,
    dynamic_shapes: Any = None, verify: bool = False,
) -> CompiledModel:
    """A quantized checkpoint of ``transformers`` as a scaled graph, in its own codes and scales.

    Reads compressed-tensors, GPTQ and AWQ (``quant_method`` in ``config.json``), from JSON and
    safetensors only; ``transformers`` builds the model. Nothing is rounded again: weights are what
    the checkpoint holds, bit for bit, and activations are quantized as it says.

    Args:
        directory: a folder as ``save_pretrained`` writes it.
        example_inputs, backend, dynamic_shapes, verify: as ``compile`` takes them. ``baseline`` of
            the result, which ``verify`` compares with, is of the decoded weights.

    Raises:
        ConfigError: where something is missing, damaged, pickled, or stored in a way that there are
            no words for, naming it.
        CaptureError: where ``torch.export`` cannot trace the model.
        BackendUnavailable: where transformers or safetensors is missing.
    """
    from scaleprop.interchange.assigning import AssignStored, OrderStored
    from scaleprop.interchange.reading import read_checkpoint

    args, kwargs = split_example(example_inputs)
    backend_named(backend)
    checkpoint = read_checkpoint(Path(directory))
    captured = capture(checkpoint.model, args, kwargs, dynamic_shapes)
    Signature.of(captured).flatten(args, kwargs)
    stored = checkpoint.weights
    passes = (OrderStored(weights=stored), AssignStored(recipe=checkpoint.recipe, weights=stored))
    manager = build(checkpoint.recipe, extra=passes, verify=verify)
    return _compiled(captured, manager, checkpoint.recipe, backend, verify)


def _plan(
    recipe: str | Recipe, target: str | Recipe | None
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe whose formats are meant, and the passes that its name asks for."""
    if recipe != AUTO:
        if target is not None:
            raise ConfigError(f"target={target!r} goes with recipe='auto'. Remedy: leave it out, "
                              "or pass recipe='auto'")
        return named_recipe(recipe), ()
    if target is None:
        raise ConfigError("recipe='auto' chooses transforms, not formats. Remedy: say which, as "
                          "target='int4', target='mxfp4', …")
    return named_recipe(target), (AUTO,)


def load(
    directory: str | Path, backend: str | None = None, *, verify: bool = True
) -> CompiledModel:
    """The model that ``CompiledModel.save`` wrote, lowered to its backend or to another one.

    Reads JSON and safetensors only; nothing is unpickled. Parameters are pages of the files, read
    when they are first used. ``verify``: compare all of them with their checksums before that.

    Raises:
        ConfigError: where the directory is not a saved model, was written by another version, or
            is damaged: the message names the file and the tensor.
    """
    saved = storage.load(Path(directory), verify)
    name = backend or saved.backend
    return CompiledModel(
        program=saved.program, recipe=saved.recipe, backend=name,
        signature=Signature.of(saved.program),
        executable=backend_named(name).lower(saved.program),
        baseline=saved.baseline, nbytes_before=saved.nbytes_before, scales=saved.scales,
        block=saved.block,
    )


def report_of(model: CompiledModel | storage.SavedModel) -> Report:
    """What the passes did, before any backend has seen it."""
    program = model.program
    return Report(recipe=model.recipe.name, backend=model.backend,
                  records=model.known.records, transforms=model.known.transforms,
                  trials=program.trials, scales=model.known.scales, block=model.known.block,
                  nbytes_before=model.nbytes_before, nbytes_after=stored_bytes(program.module),
                  notes=program.notes)


def stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; tied tensors count once."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return sum({(t.data_ptr(), t.shape): t.nbytes for t in tensors.values()}.values())
