"""What a pass is: a frozen dataclass from program to program, with checked promises.

A pass's fields are its options (in Python, in recipes and on the command line). ``requires`` is
checked on the input and ``ensures`` on the *result*. A pass never changes the program that it was
given: it works on ``program.fork()``, whose graph is its own and whose tensors are shared.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import PostconditionError
from scaleprop.passes.shelf import Shelf
from scaleprop.recipes.base import TOLERANCE
from scaleprop.report.records import TensorRecord, TransformRecord, TrialRecord

logger = logging.getLogger(__name__)

PROVENANCE = "scaleprop"  # the key in node.meta
_METADATA_CHECK: Any = getattr(torch.ops.aten, "_assert_tensor_metadata").default  # noqa: B009


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which pass made a node, why, and from which node of the captured graph."""

    by: str
    why: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A captured model on its way through the passes.

    module: flat ATen graph; parameters and buffers are ``get_attr`` nodes; every node carries its
        fake value in ``meta["val"]``. Called with the model's own (args, kwargs).
    in_spec, out_spec: pytrees of ``(args, kwargs)`` and of the model's output.
    example_args, example_kwargs: what the model was captured with.
    arguments: what the model's ``forward`` calls its arguments, in order; given or not.
    dynamic_axes: input name → {axis: dimension name}.
    guards: conditions on ``input.shape[axis]`` that the graph relies on, see ``passes.guards``.
    statistics: node name → calibration statistics of that node's output; empty before calibration.
    records: what was decided for each tensor, in graph order.
    transforms: which transforms of channels were put where, and which were refused.
    trials: what chains of transforms gave that were tried.
    is_assigned: whether formats have been assigned, be it to nothing.
    tolerance: the largest error a backend may add to a product, relative to its largest value.
    notes: what a reader should know of capture and passes: dimensions that were fixed, say.
    shelf: where passes leave what they make of parameters; None: in memory.
    """

    module: torch.fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example_args: tuple[Any, ...]
    example_kwargs: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    dynamic_axes: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)
    guards: tuple[str, ...] = ()
    statistics: Mapping[str, TensorStatistics] = dataclasses.field(default_factory=dict)
    records: tuple[TensorRecord, ...] = ()
    transforms: tuple[TransformRecord, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    is_assigned: bool = False
    tolerance: float = TOLERANCE
    notes: tuple[str, ...] = ()
    shelf: Shelf | None = None

    def fork(self) -> Program:
        """A program with its own graph and the same tensors."""
        graph = torch.fx.Graph()
        # graph_copy returns the output value instead of copying the output node
        copied: dict[torch.fx.Node, torch.fx.Node] = {}
        result = graph.graph_copy(self.module.graph, copied)
        output = graph.output(result)
        output.meta = copy.copy(self.module.graph.output_node().meta)
        codegen = self.module.graph._codegen  # pyright: ignore[reportPrivateUsage]
        graph.set_codegen(copy.copy(codegen))  # it only says how inputs and outputs are nested
        module = torch.fx.GraphModule(self.module, graph)
        return dataclasses.replace(self, module=module)

    def replace(self, **changes: Any) -> Program:
        """``dataclasses.replace``, spelled as a method."""
        return dataclasses.replace(self, **changes)

    @property
    def example_leaves(self) -> list[Any]:
        """The example inputs, flattened."""
        return pytree.tree_leaves((self.example_args, dict(self.example_kwargs)))

    @property
    def placeholders(self) -> list[torch.fx.Node]:
        """The graph's inputs, in flattened pytree order."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns: the new program, whether it differs, and what a reader should know."""

    program: Program
    modified: bool
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """One rewrite of a program. Subclasses are frozen dataclasses; fields are options."""

    name: ClassVar[str]
    preserves_function: ClassVar[bool] = False
    rewrites_parameters: ClassVar[bool] = False  # so it is verified on parameters in float64
    one_by_one: ClassVar[bool] = False  # it needs no two whole parameters in memory at once

    def requires(self, program: Program) -> None:  # noqa: B027 (most passes take any program)
        """Raise ``PreconditionError`` where ``program`` is not something this pass can take."""

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """The rewritten program; the given one is left as it was."""

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raise ``PostconditionError`` where the *result* breaks what this pass promises."""


@dataclasses.dataclass(frozen=True)
class PassManager:
    """Runs passes in order. With ``verify``, function-preserving ones are checked in float64."""

    passes: Sequence[Pass]
    verify: bool = False

    def run(self, program: Program) -> Program:
        """The program after every pass.

        Raises:
            PreconditionError, PostconditionError: naming the pass and those that ran before it.
        """
        done: list[str] = []
        for step in self.passes:
            try:
                step.requires(program)
                result = step.run(program)
                result.program.module.graph.lint()
                result.program.module.recompile()
                step.ensures(result.program)
                if self.verify and step.preserves_function and result.modified:
                    _verify(step, program, result.program)
            except Exception as error:
                error.add_note(f"in pass {step.name!r}, after {done or 'no other pass'}")
                raise
            for note in result.notes:
                logger.info("%s: %s", step.name, note)
            notes = tuple(f"{step.name}: {note}" for note in result.notes)
            program = result.program.replace(notes=(*result.program.notes, *notes))
            done.append(step.name)
        return program


def _verify(step: Pass, before: Program, after: Program) -> None:
    if not step.rewrites_parameters:
        check_same_function(step.name, before, after)
        return
    wide = widened(before)  # rewritten parameters are rounded to their dtype: let that be float64
    check_same_function(step.name, wide, step.run(wide).program, rtol=1e-10)


def check_same_function(name: str, before: Program, after: Program, rtol: float = 1e-9) -> None:
    """Compare two programs in float64 on the example inputs; quantized ones as they are.

    Raises:
        PostconditionError: where an output differs by more than ``rtol`` of its largest value.
    """
    # scaled operators fix the precision of what they read: widening would change the function
    run = run_as_is if _is_quantized(before) or _is_quantized(after) else run_in_float64
    expected, actual = (pytree.tree_leaves(_seeded(run, p)) for p in (before, after))
    for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
        if not isinstance(want, torch.Tensor):
            continue
        error = relative_error(got, want)
        if not error <= rtol:
            raise PostconditionError(
                f"pass {name!r} promises to keep the function, but output {index} differs by "
                f"{error:.3g} of its largest value in float64 (bound {rtol:.1g})"
            )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|actual − expected| / max|expected| in float64; equal NaN and Inf count as equal."""
    if expected.numel() == 0:
        return 0.0
    got, want = actual.double(), expected.double()
    difference, size = (got - want).abs(), want.abs()
    if not (difference.max() + size.max()).isfinite():  # rare, and three times the work
        same = (got == want) | (got.isnan() & want.isnan())
        difference = torch.where(same, 0.0, difference)
        size = torch.where(want.isfinite(), size, 0.0)
    return float(difference.max() / size.max().clamp_min(torch.finfo(torch.float64).tiny))


def _seeded(run: Callable[[Program], Any], program: Program) -> Any:
    """Random operators draw the same numbers on every run; the caller's generator is untouched."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(program)


def _is_quantized(program: Program) -> bool:
    return any(
        getattr(node.target, "namespace", None) == "scaleprop"
        for node in program.module.graph.nodes
    )


def run_as_is(program: Program) -> Any:
    """The program's outputs on its example inputs."""
    with torch.no_grad():
        return program.module(*program.example_args, **program.example_kwargs)


def run_in_float64(program: Program) -> Any:
    """The program's outputs on its example inputs, with every float tensor in float64."""
    return run_as_is(widened(program))


def widened(program: Program) -> Program:
    """The same program with every float tensor in float64, example inputs included.

    Casts and constants of a narrower float type are widened too, else they would round.
    """

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return torch.float64
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.double()
        return leaf

    module = program.fork().module
    for node in list(module.graph.nodes):
        if node.target is _METADATA_CHECK:
            module.graph.erase_node(node)
            continue
        if node.op == "call_function":
            node.args, node.kwargs = pytree.tree_map(widen, (node.args, node.kwargs))
        if "val" in node.meta:
            with torch.no_grad():
                node.meta["val"] = pytree.tree_map(widen, node.meta["val"])
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):  # pyright: ignore[reportPrivateUsage]
            for name, tensor in tensors.items():
                wide = widen(tensor.detach()) if isinstance(tensor, torch.Tensor) else tensor
                tensors[name] = wide
    module.recompile()
    args, kwargs = pytree.tree_map(widen, (program.example_args, dict(program.example_kwargs)))
    return program.replace(module=module, example_args=args, example_kwargs=kwargs)
