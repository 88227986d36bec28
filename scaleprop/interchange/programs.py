"""What a compiled program stores, by the names that parameters had in the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import ConfigError, describe
from scaleprop.formats import ScaledFormat, ScaledTensor, parse
from scaleprop.formats.scaled import PLAIN
from scaleprop.passes.base import Program
from scaleprop.passes.canonicalise.match import argument
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.report.records import TensorRecord

Node = torch.fx.Node

REMEDY = "Remedy: compiled.save writes scaleprop's own format, which holds everything"
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in codes, and what it is multiplied with.

    tensor: [N, K]; of a convolution [O, everything else]. kind: what reads it.
    activation: its format; None where it stays high. scales: its static scale (and zero point), or
        of two levels the scale of the whole tensor; none where dynamic.
    """

    tensor: ScaledTensor
    kind: str
    node: Node
    activation: ScaledFormat | None = None
    scales: tuple[Tensor, ...] = ()

    def agrees(self, other: Quantized) -> bool:
        """Whether both are the same codes, multiplied with activations that are treated alike."""
        same = (self.tensor.format, self.activation) == (other.tensor.format, other.activation)
        mine, others = (*self.tensor.parts, *self.scales), (*other.tensor.parts, *other.scales)
        return same and len(mine) == len(others) and all(
            a is b or (a.shape == b.shape and torch.equal(_bits(a), _bits(b)))
            for a, b in zip(mine, others, strict=True))  # fmt: skip


def quantized_weights(program: Program) -> Iterator[tuple[str, Quantized]]:
    """(parameter, weight) for every operator that reads one in codes, in graph order.

    Raises:
        ConfigError: where activations are quantized and the weight is not, or a value other than
            the input of a linear is quantized.
    """
    nodes: dict[str, Node] = {node.name: node for node in program.module.graph.nodes}
    read: set[Node] = set()
    for record in program.records:
        if record.role in ("fprop.w", "embedding") and record.format is not None:
            weight = _weight(program, nodes[record.node], record)
            if weight.kind == "linear" and isinstance(weight.node.args[0], Node):
                read.add(weight.node.args[0])
            yield record.operand, weight
    for node in nodes.values():
        if node.target in (QUANTIZE, FAKE_QUANTIZE) and node not in read:
            reader = next(iter(node.users), node)
            raise ConfigError(
                f"{describe(reader)} reads {node.args[0]} in {node.args[1]}: compressed-tensors "
                "quantizes the inputs of torch.nn.Linear with quantized weights, and no others. "
                f"{REMEDY}; or exclude= the operator")


def _weight(program: Program, node: Node, record: TensorRecord) -> Quantized:
    if node.target is SCALED_MM:
        parts, name = _tensors(program, node.args[1]), str(node.args[4])
        k: Any = node.args[5]
        shape = (parts[0].shape[0], k)
        given: Any = node.args[0]
        activation = None if node.args[3] in PLAIN else parse(str(node.args[3]))
        found = argument(given, 5, "scales") if activation is not None else None
        scales = _tensors(program, found or ())
        tensor = ScaledTensor.from_parts(parts, name, shape)
        return Quantized(tensor, "linear", node, activation, tuple(scales))
    decoded = node if node.target is DEQUANTIZE else _decoded(node)
    rows: Any = decoded.args[0]
    sources = [row if row.op == "get_attr" else row.args[0] for row in rows]
    parts = _tensors(program, sources)
    size: Any = decoded.args[2]
    tensor = ScaledTensor.from_parts(parts, str(decoded.args[1]), (parts[0].shape[0], size[-1]))
    return Quantized(tensor, "embedding" if record.role == "embedding" else "conv", node)


def _decoded(node: Node) -> Node:
    """Where the weight of a convolution is decoded."""
    pending = list(node.all_input_nodes)
    while pending:
        source = pending.pop(0)
        if source.target is DEQUANTIZE:
            return source
        if source.op == "call_function":
            pending += source.all_input_nodes
    raise ConfigError(f"{describe(node)} reads no stored weight. {REMEDY}")


def _tensors(program: Program, sources: Any) -> list[Tensor]:
    return [tensor_of(program, str(source.target)) for source in sources]


def tensor_of(program: Program, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    value: Any = program.module
    for part in name.split("."):
        value = getattr(value, part)
    return value.detach()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(
        torch.uint8)  # fmt: skip


def with_high_activations(program: Program) -> Program:
    """The same program with its weights in codes and every activation as it is."""
    high = program.fork()
    for node in high.module.graph.nodes:
        source: Any = node.args[0] if node.target is SCALED_MM else None
        if isinstance(source, Node):
            x: Any = source.args[0]
            node.args = ([x], *node.args[1:3], _NAMES[x.meta["val"].dtype], *node.args[4:])
    high.module.graph.eliminate_dead_code()
    high.module.recompile()
    return high


def refuse_runtime(program: Program) -> None:
    """Raise ``ConfigError`` where a transform left something to do at run time."""
    for record in program.transforms:
        if record.refused is None and record.runtime:
            raise ConfigError(
                f"{record.by}: the {record.kind} at {record.seed} is computed at run time "
                f"({'; '.join(record.runtime[:2])}), and a checkpoint holds parameters only. "
                f"{REMEDY}; or use a method whose transforms parameters take up")


def read_names(program: Program) -> Mapping[str, Node]:
    """Parameters and buffers that the graph reads, and a node that does."""
    return {str(node.target): next(iter(node.users), node)
            for node in program.module.graph.nodes if node.op == "get_attr"}  # fmt: skip
