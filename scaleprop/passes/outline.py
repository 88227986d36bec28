"""What a graph computes, as plain data: operators, the values that they read, and their modules.

Views, casts between float types and copies are passed through; integers, masks and vectors of
parameters are left out. What is left is small enough to be kept, and drawn.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx

from scaleprop._torch_compat import OpOverload
from scaleprop.errors import source_line
from scaleprop.passes.base import PROVENANCE, Program
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.rules import contraction_of, rule_for

aten: Any = torch.ops.aten
_GET: Any = operator.getitem
_PASSED = frozenset((aten._to_copy.default, aten.clone.default, aten.detach.default,
                     aten.alias.default, aten.lift_fresh_copy.default))
_KINDS: Mapping[Any, Literal["quantize", "dequantize"]] = {
    QUANTIZE: "quantize", FAKE_QUANTIZE: "quantize", DEQUANTIZE: "dequantize"}
_PARTS = (SCALED_MM, DEQUANTIZE)  # read lists of what one value is stored in
STORED = re.compile(r"_data_*$")  # what quantize-weights calls codes


@dataclasses.dataclass(frozen=True)
class Read:
    """One value that a step reads. source: the step that makes it; via: the names of the nodes that
    it comes through, the source's first."""

    source: str
    via: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One operator, parameter or input.

    op: what it is called without library and overload; of a parameter or an input, its own name.
    stack: modules that it is in, outermost first: (path, class). format: that its result or its
    data is in, "" where that is high. product: whether it sums products of values. why: what a pass
    says of it. leaves: whether the model returns it.
    """

    name: str
    op: str
    kind: Literal["operator", "quantize", "dequantize", "parameter", "input"]
    stack: tuple[tuple[str, str], ...] = ()
    reads: tuple[Read, ...] = ()
    format: str = ""
    shape: tuple[int | str, ...] = ()
    dtype: str = ""
    source: str = ""
    product: bool = False
    why: str = ""
    leaves: bool = False

    @property
    def module(self) -> str:
        """The path of its innermost module."""
        if self.kind == "parameter":
            return self.op.rpartition(".")[0]
        return self.stack[-1][0] if self.stack else ""

    def is_in(self, path: str) -> bool:
        """Whether it is an operator of a module; "" is the whole model."""
        return self.kind not in ("parameter", "input") and (
            not path or any(path == each for each, _ in self.stack))


@dataclasses.dataclass(frozen=True)
class Outline:
    """Steps in graph order; each reads earlier ones."""

    steps: tuple[Step, ...]

    def named(self) -> dict[str, Step]:
        """Name → step."""
        return {step.name: step for step in self.steps}


def outline_of(program: Program) -> Outline:
    """The outline of a captured or compiled program."""
    graph = program.module.graph
    parameters = {node: str(node.target) for node in graph.find_nodes(op="get_attr")}
    return _Walk(graph, parameters, frozenset()).outline()


def forward_outline(
    joint: torch.fx.Graph, parameters: Mapping[torch.fx.Node, str],
    backward: Collection[torch.fx.Node],
) -> Outline:
    """The outline of a joint graph without what is ``backward``. parameters: its inputs that are →
    name."""
    return _Walk(joint, parameters, backward).outline()


class _Walk:
    def __init__(
        self, graph: torch.fx.Graph, parameters: Mapping[torch.fx.Node, str],
        left_out: Collection[torch.fx.Node],
    ) -> None:
        self._graph, self._parameters, self._left_out = graph, parameters, left_out
        self._steps: dict[torch.fx.Node, Step] = {}
        self._stored = _parts_of_stored(graph)

    def outline(self) -> Outline:
        results = [node for node in self._graph.output_node().all_input_nodes
                   if node not in self._left_out]
        live = _behind(results)  # else what forward makes again for backward
        for node in self._graph.nodes:
            if node.op == "call_function" and node in live and node not in self._stored \
                    and not _is_passed(node) and is_drawn(node):
                self._step(node)
        left = {self._root(node)[0] for node in results}
        return Outline(tuple(dataclasses.replace(step, leaves=node in left)
                             for node, step in self._steps.items()))

    def _step(self, node: torch.fx.Node) -> None:
        if node.target not in _PARTS and not any(
                self._is_known(self._root(source)[0]) for source in node.all_input_nodes):
            return  # a constant, or a mask
        reads: dict[str, Read] = {}
        for arg, format_ in _operands(node):
            found = self._read(node, arg, format_)
            if found is not None:
                reads.setdefault(found.source, found)
        made = node.meta.get(PROVENANCE)
        self._steps[node] = Step(
            name=node.name, op=op_name(node.target), kind=_KINDS.get(node.target, "operator"),
            stack=stack_of(node), reads=tuple(reads.values()),
            format=str(node.args[1]) if node.target in (QUANTIZE, FAKE_QUANTIZE) else "",
            source=source_line(node), why=made.why if made is not None else "",
            product=node.target is SCALED_MM or contraction_of(node) is not None,
            **_value(node))

    def _read(self, reader: torch.fx.Node, arg: torch.fx.Node, format_: str) -> Read | None:
        """What ``reader`` has of a value that is drawn."""
        source, via = self._root(arg)
        if reader.target in _PARTS:
            while source.op == "call_function" and source.target is not QUANTIZE \
                    and source not in self._steps and source.all_input_nodes:
                source, more = self._root(source.all_input_nodes[0])  # rows of stored codes
                via = (*more, *via)
        if source not in self._steps and not self._given(source, format_):
            return None
        return Read(self._steps[source].name, via)

    def _is_known(self, node: torch.fx.Node) -> bool:
        """Whether a value is a step, or a float parameter or input, drawn or not."""
        value = node.meta.get("val")
        return node in self._steps or (
            node.op != "call_function" and isinstance(value, torch.Tensor)
            and value.is_floating_point())

    def _given(self, node: torch.fx.Node, format_: str) -> bool:
        """Take in a parameter or an input; False for what is left out."""
        value = node.meta.get("val")
        if node.op == "call_function" or not isinstance(value, torch.Tensor):
            return False
        is_parameter = node in self._parameters
        may_be_vector = not is_parameter and not self._left_out  # a joint graph has buffers there
        if not format_ and not (value.is_floating_point() and (value.ndim > 1 or may_be_vector)):
            return False
        name = self._parameters.get(node, str(node.target))
        self._steps[node] = Step(
            name=node.name, op=STORED.sub("", name) if format_ else name,
            kind="parameter" if is_parameter else "input", format=format_, **_value(node))
        return True

    def _root(self, node: torch.fx.Node) -> tuple[torch.fx.Node, tuple[str, ...]]:
        """Where a value comes from, and the names on the way."""
        via = [node.name]
        while _is_passed(node):
            node = node.all_input_nodes[0]
            via.append(node.name)
        return node, tuple(reversed(via))


def _behind(results: Sequence[torch.fx.Node]) -> set[torch.fx.Node]:
    """What results depend on, themselves included."""
    found: set[torch.fx.Node] = set()
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _parts_of_stored(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Rows of stored codes and of their scales: no values of their own, whatever their type is."""
    found: set[torch.fx.Node] = set()
    for reader in graph.nodes:
        for parts, format_ in _stored_in(reader) if reader.target in _PARTS else ():
            for part in filter(None, parts if format_ else ()):
                way: list[torch.fx.Node] = []
                while part.op == "call_function" and part.all_input_nodes \
                        and part.target not in (QUANTIZE, *_PARTS):
                    way.append(part)
                    part = part.all_input_nodes[0]
                if part.op == "get_attr":
                    found.update(way)
    return found


def _operands(node: torch.fx.Node) -> Iterator[tuple[torch.fx.Node, str]]:
    """What a node reads, in order, each with the format that it is stored in."""
    if node.target in _PARTS:
        for parts, format_ in _stored_in(node):
            yield parts[0], format_
        return
    static = node.target in (QUANTIZE, FAKE_QUANTIZE)  # scales are no values
    for source in node.all_input_nodes[:1] if static else node.all_input_nodes:
        yield source, ""


def _stored_in(node: torch.fx.Node) -> Iterator[tuple[Sequence[Any], str]]:
    """Codes and scales of each operand, and their format; "" where the first is the value."""
    formats = (node.args[1],) if node.target is DEQUANTIZE else (node.args[3], node.args[4])
    for arg, format_ in zip(node.args, formats, strict=False):
        parts: Any = arg if isinstance(arg, Sequence) else [arg]
        name = str(format_)
        yield parts, "" if name in ("f32", "bf16", "f16") else name


def _is_passed(node: torch.fx.Node) -> bool:
    """Whether a node has its value from one other, as it is."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    rule = rule_for(node.target)
    if node.target is _GET or (rule is not None and rule.moves):
        return True
    source = node.all_input_nodes[0].meta.get("val")
    return node.target in _PASSED and isinstance(source, torch.Tensor) \
        and source.is_floating_point()


def is_drawn(node: torch.fx.Node) -> bool:
    """Whether a node makes a float value, or a quantized one."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return node.target is QUANTIZE or any(
        isinstance(each, torch.Tensor) and each.is_floating_point() for each in values)


def op_name(target: Any) -> str:
    """``layer_norm`` of ``aten.layer_norm.default``, and of ``aten.native_layer_norm.default``."""
    if not isinstance(target, OpOverload):
        return str(getattr(target, "__name__", target))
    name = target.overloadpacket.__name__.lstrip("_").removeprefix("native_")
    return re.sub(r"(_legit|_no_training|_functional|_for_cpu)+$", "", name)


def stack_of(node: torch.fx.Node) -> tuple[tuple[str, str], ...]:
    """The modules that a node is in, outermost first: path as ``named_modules`` has it, class."""
    given: Mapping[str, Any] = node.meta.get("nn_module_stack") \
        or node.meta.get("fwd_nn_module_stack") or {}  # what backward is of
    found: dict[str, str] = {}
    for entry in given.values():
        path, kind = str(entry[0]), entry[1]
        path = module_path(path) if path.startswith(("L[", "G[", "L__")) else path
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if not path.startswith("_empty_nn_module_stack"):
            found[path] = name
    return tuple(found.items())


def module_paths(node: torch.fx.Node) -> tuple[str, ...]:
    """The modules around ``node``, outermost first: ``("encoder", "encoder.layer.0")``."""
    return tuple(path for path, _ in stack_of(node) if path)


def module_path(name: str) -> str:
    """``L['self']._modules['blocks']._modules['0'].up`` → ``blocks.0.up``."""
    path = name.replace("._modules['", ".").replace("']", "").replace('"', "")
    path = path.replace("L['", "").replace("G['", "").replace("[", ".").replace("]", "")
    parts = [part for part in path.split(".") if part]
    return ".".join(parts[1:])


def _value(node: torch.fx.Node) -> dict[str, Any]:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, tuple | list) and value else value
    if not isinstance(first, torch.Tensor):
        return {}
    sizes: tuple[Any, ...] = tuple(first.shape)
    return {"shape": tuple(size if isinstance(size, int) else str(size) for size in sizes),
            "dtype": str(first.dtype).removeprefix("torch.")}
