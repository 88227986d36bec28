"""From a scaled program to plain ATen, and what multiplies, with symbolic sizes.

An interpreter runs the program's graph on fake tensors; ``make_fx`` records what it does, with
Inductor's own decompositions. Constants enter as extra inputs and become attributes afterwards.
What becomes of ``scaleprop::*`` is told by a ``Dialect``: this package's is ATen and oneDNN.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from scaleprop import ops
from scaleprop.backends.inductor import casts, compat
from scaleprop.backends.inductor.constants import constants_of
from scaleprop.backends.inductor.emit import Inputs, emit
from scaleprop.backends.inductor.linears import (
    Constants,
    Epilogue,
    Operand,
    Weight,
    given_scales,
    plan,
)
from scaleprop.errors import LoweringError, describe
from scaleprop.ops import implementations
from scaleprop.passes.base import Program

_ATEN = torch.ops.aten
# Float operators worth running in bfloat16, with how many leading arguments are data.
_MATRIX: Mapping[Any, int] = {
    _ATEN.scaled_dot_product_attention.default: 3,
    _ATEN.matmul.default: 2, _ATEN.bmm.default: 2, _ATEN.mm.default: 2,
    _ATEN.linear.default: 2,
}  # fmt: skip
_MOVEMENT = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN.transpose.int, _ATEN.permute.default,
    _ATEN.expand.default, _ATEN.unsqueeze.default, _ATEN.clone.default, _ATEN.slice.Tensor,
    _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default, _ATEN.unbind.int,
    _ATEN.select.int, _ATEN.squeeze.dim, _ATEN.alias.default, operator.getitem,
}  # fmt: skip


class Planned(Protocol):
    """What becomes of one or more ``scaled_mm``; ``Linear`` says what the fields are."""

    @property
    def kind(self) -> str: ...
    @property
    def operand(self) -> Operand: ...
    @property
    def members(self) -> Sequence[tuple[torch.fx.Node, int, int]]: ...
    @property
    def constants(self) -> Mapping[str, Weight]: ...
    @property
    def epilogue(self) -> Epilogue: ...
    @property
    def description(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Call:
    """What computes a node's value from others': arguments may hold nodes. named: in the report."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    named: str


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What becomes of ``scaleprop::*``.

    plan: every ``scaled_mm`` of a graph whose constants are known. emit: one of these, in a dtype.
    replaced: operator → what runs for it. named: what a node of these is called in the report,
    with all that was planned. fuse: nodes that are computed together with what they read.
    """

    plan: Callable[[torch.fx.Graph, Constants], Sequence[Any]]
    emit: Callable[[Any, Inputs, Mapping[str, Tensor], torch.dtype], Tensor]
    replaced: Mapping[Any, Callable[..., Any]]
    named: Callable[[torch.fx.Node, Sequence[Any]], str]
    device: torch.device
    fuse: Callable[[torch.fx.Graph, Sequence[Any]], Mapping[torch.fx.Node, Call]] = (
        lambda graph, linears: {})


def onednn(compute: torch.dtype) -> Dialect:
    """For the CPU. compute: float32, or bfloat16 for unquantized matrix products."""
    return Dialect(
        lambda graph, known: plan(graph, known, compute), emit,
        {ops.quantize: casts.quantize, ops.dequantize: implementations.dequantize,
         ops.fake_quantize: implementations.fake_quantize,
         ops.hadamard: implementations.hadamard},
        lambda node, linears: "fused C++", torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Traced:
    """A flat ATen graph. inputs: those of the program's inputs that it takes, by position.

    outputs: per output leaf, the position among the graph's outputs, or the constant itself.
    symbols: symbolic size → (position among all leaves, axis) where it is read.
    lowerings: program node → what runs for it.
    """

    module: torch.fx.GraphModule
    inputs: tuple[int, ...]
    fakes: tuple[Any, ...]
    outputs: tuple[tuple[bool, Any], ...]
    symbols: Mapping[Any, tuple[int, int]]
    lowerings: Mapping[str, str]


def trace(program: Program, dialect: Dialect, compute: torch.dtype, mode: Any,
          sizes: Mapping[Any, int] | None = None) -> Traced:
    """Plan the linears of ``program`` and record it as ATen, on the dialect's device.

    compute: float32, or bfloat16 for attention and other unquantized matrix products.
    mode: the fake mode to trace in. sizes: numbers to put in place of symbolic sizes; then
        ``mode`` is a new one.

    Raises:
        LoweringError: naming the node that could not be traced.
    """
    graph = program.module.graph
    known = constants_of(program.module)
    linears = dialect.plan(graph, known)
    fixed = _Fixed(mode, known, linears, dialect.device)
    placeholders = program.placeholders
    taken = tuple(i for i, node in enumerate(placeholders)
                  if isinstance(node.meta.get("val"), (Tensor, torch.SymInt)))
    fakes = [_contiguous(placeholders[i].meta["val"], mode, sizes or {}, dialect.device)
             for i in taken]
    outputs: list[tuple[bool, Any]] = []

    def run(*values: Any) -> list[Any]:
        lowering = _Lowering(program.module, fixed, values[:fixed.count], linears, dialect,
                             compute)
        leaves: list[Any] = [node.meta.get("val") for node in placeholders]
        for index, value in zip(taken, values[fixed.count:], strict=True):
            leaves[index] = value
        results = lowering.run(*leaves, enable_io_processing=False)
        flat = pytree.tree_leaves(results)
        tensors = [leaf for leaf in flat if isinstance(leaf, (Tensor, torch.SymInt))]
        positions = iter(range(len(tensors)))
        outputs.extend((True, next(positions)) if isinstance(leaf, (Tensor, torch.SymInt))
                       else (False, leaf) for leaf in flat)
        return tensors

    module = compat.trace(run, [*fixed.fakes, *fakes], mode)
    fixed.become_attributes(module)
    return Traced(module, taken, tuple(fakes), tuple(outputs), _symbols(taken, fakes),
                  _descriptions(graph, linears, known, dialect))


def _contiguous(value: Any, mode: Any, sizes: Mapping[Any, int], device: torch.device) -> Any:
    """A fake of the same sizes with a dense layout: callers' other layouts are copied."""
    def known(size: Any) -> Any:
        if not sizes or not isinstance(size, torch.SymInt):
            return size
        return int(size.node.expr.xreplace(dict(sizes)))

    if not isinstance(value, Tensor):
        return known(value)
    with mode:
        return torch.empty([known(size) for size in value.shape], dtype=value.dtype, device=device)


def _symbols(taken: Sequence[int], fakes: Sequence[Any]) -> dict[Any, tuple[int, int]]:
    found: dict[Any, tuple[int, int]] = {}
    for index, fake in zip(taken, fakes, strict=True):
        sizes: Any = fake.shape if isinstance(fake, Tensor) else (fake,)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (index, axis))
    return found


class _Fixed:
    """Every constant, as an input of the trace: nodes' values first, then linears' weights."""

    def __init__(self, mode: Any, known: Mapping[torch.fx.Node, Tensor],
                 linears: Sequence[Planned], device: torch.device) -> None:
        owned = {part for linear in linears if linear.kind != "open"
                 for part in linear.operand.node.all_input_nodes}
        entries: list[tuple[Any, Weight]] = [
            (node, Weight(value, tuple(value.shape), value.dtype)) for node, value in known.items()
            if not (node in owned and _only_weights(node))
        ]
        for index, linear in enumerate(linears):
            entries += [((index, name), weight) for name, weight in linear.constants.items()]
        self.keys = [key for key, _ in entries]
        self.tensors = [weight.tensor.to(device) for _, weight in entries]
        with mode:
            self.fakes = [torch.empty(weight.shape, dtype=weight.dtype, device=device)
                          for _, weight in entries]

    @property
    def count(self) -> int:
        return len(self.keys)

    def become_attributes(self, module: torch.fx.GraphModule) -> None:
        """Turn the trace's leading inputs into attributes; unused ones vanish."""
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for index, (node, tensor) in enumerate(zip(placeholders, self.tensors, strict=False)):
            if node.users:
                name = f"_constant{index}"
                module.register_buffer(name, tensor)
                with graph.inserting_before(placeholders[self.count] if
                                            len(placeholders) > self.count else node):
                    read = graph.get_attr(name)
                read.meta = dict(node.meta)
                node.replace_all_uses_with(read)
            graph.erase_node(node)
        _attributes_after_inputs(graph)
        graph.lint()
        module.recompile()


def _only_weights(node: torch.fx.Node) -> bool:
    return all(user.target is ops.scaled_mm for user in node.users)


def _attributes_after_inputs(graph: torch.fx.Graph) -> None:
    """Inductor reads inputs first."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs:
        return
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        inputs[-1].append(node)


class _Lowering(torch.fx.Interpreter):
    """Runs a program's graph with every ``scaleprop`` operator replaced."""

    def __init__(self, module: torch.fx.GraphModule, fixed: _Fixed, values: Sequence[Any],
                 linears: Sequence[Planned], dialect: Dialect, compute: torch.dtype) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.fixed: dict[Any, Any] = dict(zip(fixed.keys, values, strict=True))
        self.linear_of = {node: (index, linear) for index, linear in enumerate(linears)
                          for node, _, _ in linear.members}
        self.skipped = {node: linear.members[0][0] for linear in linears
                        for node in linear.epilogue.nodes}
        self.results: dict[int, Tensor] = {}
        self.dialect, self.compute = dialect, compute
        self.fused = dialect.fuse(module.graph, linears)
        self.inputs = Inputs(self.env)

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            return self._run(n)
        except LoweringError:
            raise
        except Exception as error:
            raise LoweringError(
                f"{describe(n)}: tracing for Inductor failed: {type(error).__name__}: {error}. "
                "Exclude this operator, or use backend='reference'."
            ) from error

    def _run(self, n: torch.fx.Node) -> Any:
        if n in self.fixed:
            return self.fixed[n]
        if n in self.skipped:
            value = self.env[self.skipped[n]]
            is_codes = n.target is ops.quantize
            return [value, *self._given(n)] if is_codes else value
        if n in self.linear_of:
            return self._linear(n)
        if n in self.fused:
            call = self.fused[n]
            return call.function(*map_arg(call.args, lambda node: self.env[node]))
        self.inputs.values = self.env
        if self.compute != torch.float32 and n.target in _MATRIX:
            return self._narrow(n)
        return super().run_node(n)

    def _given(self, n: torch.fx.Node) -> list[Any]:
        return [self.env[scale] for scale in given_scales(n) or ()]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        function = self.dialect.replaced.get(target, target)
        if "device" in kwargs:  # of what makes tensors, where the program was captured
            kwargs = {**kwargs, "device": self.dialect.device}
        return super().call_function(function, args, kwargs)

    def _linear(self, n: torch.fx.Node) -> Any:
        self.inputs.values = self.env
        index, linear = self.linear_of[n]
        if linear.kind == "open":
            return self._open(linear)
        if index not in self.results:
            parts = {name: self.fixed[index, name] for name in linear.constants}
            last = linear.epilogue.activation or linear.epilogue.add
            ends = [node if last is None else last for node, _, _ in linear.members]
            narrow = all(_read_narrow(end, self.compute) for end in ends)
            dtype = self.compute if narrow else torch.float32
            self.results[index] = self.dialect.emit(linear, self.inputs, parts, dtype)
        result = self.results[index]
        start, stop = next((a, b) for node, a, b in linear.members if node is n)
        return result if len(linear.members) == 1 else result[..., start:stop]

    def _open(self, linear: Planned) -> Tensor:
        """Weights that inputs change: dequantized at run time."""
        operand = linear.operand
        weight = [self.env[part] for part in operand.weight]
        w = implementations.operand(
            weight, "f32" if operand.w_format is None else str(operand.w_format), operand.k,
            torch.float32)
        bias = None if operand.bias is None else self.env[operand.bias].to(torch.float32)
        return torch.nn.functional.linear(self.inputs.plain(operand).to(torch.float32), w, bias)

    def _narrow(self, n: torch.fx.Node) -> Any:
        """Data in bfloat16, sums in float32, the result as before."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        count = _MATRIX[n.target]
        data = [value.to(self.compute) for value in args[:count]]
        rest = [value.to(self.compute) if isinstance(value, Tensor) and value.is_floating_point()
                else value for value in args[count:]]
        kwargs = {key: value.to(self.compute) if isinstance(value, Tensor)
                  and value.is_floating_point() else value for key, value in kwargs.items()}
        result = self.call_function(n.target, (*data, *rest), kwargs)
        return result.to(n.meta["val"].dtype)


def _read_narrow(node: torch.fx.Node, compute: torch.dtype) -> bool:
    """Whether every reader of ``node`` is going to narrow it anyway."""
    if compute == torch.float32:
        return False
    return all(
        user.target in _MATRIX or user.target in (ops.quantize, _ATEN.sym_size.int)
        or (user.target in _MOVEMENT and _read_narrow(user, compute)) for user in node.users)


def _descriptions(graph: torch.fx.Graph, linears: Sequence[Planned],
                  known: Mapping[torch.fx.Node, Tensor], dialect: Dialect) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.target in dialect.replaced:
            folded = node in known
            found[node.name] = "folded when compiled" if folded else dialect.named(node, linears)
    fused = dialect.fuse(graph, linears)
    found.update({node.name: call.named for node, call in fused.items()})
    for linear in linears:
        for node, _, _ in linear.members:
            found[node.name] = linear.description
        for node in linear.epilogue.nodes:
            found[node.name] = f"in the epilogue of {linear.members[0][0].name}"
    return found
