"""``scaleprop::*`` operators to ONNX nodes; see ``products`` for how a matrix product is chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from scaleprop import ops
from scaleprop.backends.onnxruntime.context import Context, Node
from scaleprop.backends.onnxruntime.quantized import rounding as rounds
from scaleprop.backends.onnxruntime.quantized import scales as scale_rules
from scaleprop.backends.onnxruntime.quantized.emit import Emitter
from scaleprop.backends.onnxruntime.quantized.expand import (
    computed_values,
    constant_matrix,
    why_not,
)
from scaleprop.backends.onnxruntime.quantized.operand import Quantized
from scaleprop.backends.onnxruntime.quantized.products import Problem, choose
from scaleprop.backends.onnxruntime.quantized.weights import Weight
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.errors import LoweringError, describe
from scaleprop.formats import ScaledTensor, parse
from scaleprop.formats.scaled import PLAIN, ScaledFormat
from scaleprop.ops.hadamard import hadamard_matrix
from scaleprop.rules import contraction_of

logger = logging.getLogger(__name__)

assert ops  # imported for what it registers
OPS = torch.ops.scaleprop
LOADING = 2.0**29  # bytes of weights' expansion at load, from which on kernels that need none win


@lowers(OPS.quantize.default)
def lower_quantize(ctx: Context, node: Node, x: Node, format: str, axis: int = -1,
                   rounding: str = "nearest", bits: Any = None,
                   scales: Sequence[Node] | None = None) -> Quantized:
    """A lazy operand: its consumers decide what is computed."""
    rank = ctx.rank(x)
    if axis % rank != rank - 1:
        raise LoweringError(f"{describe(node)}: codes along axis {axis} of {rank}; remedy: move "
                            f"the axis last, or use fake_quantize")
    return _activation(ctx, node, x, parse(format), rounding, scales)


@lowers(OPS.fake_quantize.default)
def lower_fake_quantize(ctx: Context, node: Node, x: Node, format: str, axis: int = -1,
                        rounding: str = "nearest", bits: Any = None,
                        scales: Sequence[Node] | None = None) -> ir.Value:
    """x̂ in float32, rounded by arithmetic; the quantized axis is moved last where it must be."""
    fmt, rank = parse(format), ctx.rank(x)
    constant = ctx.tensor(x)
    if constant is not None and scales is None and rounding == "nearest":
        value = OPS.fake_quantize(constant, format, axis)
        return ctx.weight(value, node.name)
    if axis % rank == rank - 1 or fmt.granularity.kind == "tensor":
        operand = _activation(ctx, node, x, fmt, rounding, scales)
        ctx.lowered_as(node, f"float32 arithmetic rounding to {fmt}")
        channels = _channels_convolved(node)
        return operand.fake if channels is None else operand.fake_of_channels(channels)
    order = [i for i in range(rank) if i != axis % rank] + [axis % rank]
    e = Emitter(ctx.builder)
    moved = e("Transpose", ctx.value(x, torch.float32), perm=order)
    size = _known_size(ctx, node, x, axis)
    _check(ctx, node, fmt, rounding, _static(ctx, node, scales))
    operand = Quantized(e, moved, fmt, rank, size, _static(ctx, node, scales))
    ctx.lowered_as(node, f"float32 arithmetic rounding to {fmt}")
    return e("Transpose", operand.fake, perm=[order.index(i) for i in range(rank)])


def _channels_convolved(node: Node) -> int | None:
    """How many channels convolutions read of ``node``; None: none reads it, or it is not known."""
    found = [contraction for user in node.users
             if (contraction := contraction_of(user)) is not None and contraction.kind == "conv"
             and user.args[0] is node]
    size = node.meta["val"].shape[1] if found and node.meta["val"].ndim > 2 else None
    return size if isinstance(size, int) else None


@lowers(OPS.dequantize.default)
def lower_dequantize(ctx: Context, node: Node, parts: Sequence[Node] | Node, format: str,
                     shape: Sequence[Any], axis: int = -1,
                     dtype: torch.dtype = torch.float32) -> ir.Value:
    """x̂: of an activation, of a constant (expanded at load), or of gathered rows (run time)."""
    fmt = parse(format)
    if isinstance(parts, Node) and isinstance(ctx.result(parts), Quantized):
        return ctx.result(parts).fake
    _check_stored(node, fmt)
    found = ctx.parts(parts)
    e = Emitter(ctx.builder)
    rank = len(shape)
    last = axis % rank == rank - 1
    tensors = [part for part in found if isinstance(part, torch.Tensor)]
    if fmt.granularity.kind == "tile" and rank != 2:
        raise LoweringError(f"{describe(node)}: [{fmt.granularity}] blocks of {rank} axes; remedy: "
                            f"reshape to a matrix before quantizing, or use 1-D blocks")
    if len(tensors) == len(found):
        sizes = [_size(ctx, node, size) for size in shape]
        tensor = ScaledTensor.from_parts(tensors, fmt, sizes, axis)
        ctx.lowered_as(node, f"{fmt} in the file, expanded at load")
        key = ("dequantize", tensors[0].data_ptr(), str(fmt), tuple(sizes), axis)
        if key not in ctx.memo:
            ctx.memo[key] = constant_matrix(e, tensor, node.name)
        return ctx.memo[key]
    if not last or fmt.granularity.kind not in ("row", "block", "tensor"):
        raise LoweringError(f"{describe(node)}: computed parts of {fmt} along axis {axis}; remedy: "
                            f"quantize along the last axis, with scales per row or block")
    if isinstance(parts, Node):
        raise LoweringError(f"{describe(node)}: its parts come from {parts.target}; remedy: pass "
                            f"tensors or a scaleprop::quantize node")
    values = [_gathered(ctx, e, part) for part in parts]
    ctx.lowered_as(node, f"{fmt} rows, expanded when they are read")
    return computed_values(e, values, fmt, rank, _size(ctx, node, shape[-1]))


@lowers(OPS.scaled_mm.default)
def lower_scaled_mm(ctx: Context, node: Node, x: Sequence[Node] | Node,
                    w: Sequence[Node] | Node, bias: Node | None, x_format: str, w_format: str,
                    k: Any) -> ir.Value:
    """The fastest faithful product; what it is goes into the report."""
    e = Emitter(ctx.builder)
    operand = _left(ctx, node, x, x_format)
    if w_format in PLAIN:
        return _plain_product(ctx, node, e, operand, w, bias)
    parts = [] if isinstance(w, Node) else ctx.parts(w)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not parts or len(tensors) != len(parts):
        raise LoweringError(f"{describe(node)}: the weight is computed at run time; remedy: "
                            f"keep weights as parameters, or quantize this operator's inputs with "
                            f"fake_quantize")
    _check_stored(node, parse(w_format))
    weight = _weight(ctx, node, w, tensors, parse(w_format), _size(ctx, node, k))
    added = None if bias is None else ctx.tensor(bias)
    problem = Problem(operand, weight, _rows(ctx, x), added)
    chosen = choose(problem, ctx.tolerance, LOADING - ctx.loading)
    ctx.loading += chosen.loading(problem) * weight.inputs * weight.outputs
    logger.debug("%s: %s, %.3g s", node.name, chosen.name, chosen.seconds(problem))
    ctx.lowered_as(node, chosen.name)
    ctx.bounds[node.name] = chosen.error(problem)
    y = chosen.emit(e, problem)
    weight.release()
    if bias is not None and added is None:
        y = e("Add", y, ctx.value(bias, torch.float32))
    return y


@lowers(OPS.hadamard.default)
def lower_hadamard(ctx: Context, node: Node, x: Node, block: int, signs: Node | None = None,
                   axis: int = -1, transpose: bool = False) -> ir.Value:
    """x·diag(signs)·H/√block, or x·Hᵀ/√block·diag(signs): a float32 product with one constant
    matrix per block."""
    e, rank = Emitter(ctx.builder), ctx.rank(x)
    size = _known_size(ctx, node, x, axis)
    order = [i for i in range(rank) if i != axis % rank] + [axis % rank]
    moved = axis % rank != rank - 1
    value = ctx.value(x, torch.float32)
    value = e("Transpose", value, perm=order) if moved else value
    matrix = hadamard_matrix(block, torch.float32, torch.device("cpu")) / math.sqrt(block)
    matrix = matrix.t().contiguous() if transpose else matrix
    flips = None if signs is None else ctx.tensor(signs)
    if signs is not None and flips is None:
        raise LoweringError(f"{describe(node)}: signs are computed at run time; remedy: "
                            f"register them as a buffer")
    flipped = None if flips is None else e.f32(flips.float().reshape(-1, block).numpy())
    value = e.split_last(value, rank, size, block)
    value = value if flipped is None or transpose else e("Mul", value, flipped)
    value = e("MatMul", value, e.f32(matrix.numpy()))
    value = e("Mul", value, flipped) if flipped is not None and transpose else value
    value = e.join_last(value, rank, size, block)
    ctx.lowered_as(node, f"MatMul by a {block}×{block} Hadamard matrix")
    return e("Transpose", value, perm=[order.index(i) for i in range(rank)]) if moved else value


def _gathered(ctx: Context, e: Emitter, part: Node) -> ir.Value:
    """A part of gathered rows. onnxruntime gathers no float8: their bytes are gathered instead."""
    if part.target is not torch.ops.aten.index.Tensor or ctx.dtype(part).itemsize != 1:
        return ctx.value(part)
    table, (ids,) = ctx.tensor(part.args[0]), part.args[1]  # type: ignore[misc]
    if table is None or not table.dtype.is_floating_point:
        return ctx.value(part)
    stored = ctx.weight(table.view(torch.uint8), str(part.args[0]))
    rows = e("Gather", stored, ctx.value(ids, torch.int64), axis=0)  # type: ignore[arg-type]
    rows.type = ir.TensorType(ir.DataType.UINT8)
    return rows


def _weight(ctx: Context, node: Node, w: Sequence[Node] | Node, parts: list[torch.Tensor],
            fmt: ScaledFormat, size: int) -> Weight:
    """The weight of these parts; tied ones are one object and stored once."""
    key = ("weight", str(fmt), size, *(part.data_ptr() for part in parts if part.numel() > 1))
    if key not in ctx.memo:
        tensor = ScaledTensor.from_parts(parts, fmt, [parts[0].shape[0], size])
        ctx.memo[key] = Weight(tensor, _name(w, node))
    return ctx.memo[key]


def _left(ctx: Context, node: Node, x: Sequence[Node] | Node, name: str) -> Quantized:
    """The left operand: a quantize node, or a plain tensor."""
    if name not in PLAIN:
        found = ctx.result(x) if isinstance(x, Node) else None
        if not isinstance(found, Quantized):
            raise LoweringError(f"{describe(node)}: the left operand in {name} is not a "
                                f"scaleprop::quantize node; remedy: quantize it in the graph")
        return found
    source = x if isinstance(x, Node) else x[0]
    key = ("plain", source)
    if key not in ctx.memo:
        size = _known_size(ctx, node, source, -1)
        ctx.memo[key] = Quantized(Emitter(ctx.builder), ctx.value(source, torch.float32), None,
                                  ctx.rank(source), size)
    return ctx.memo[key]


def _plain_product(ctx: Context, node: Node, e: Emitter, operand: Quantized,
                   w: Sequence[Node] | Node, bias: Node | None) -> ir.Value:
    """A product whose weight is not quantized."""
    source = w if isinstance(w, Node) else w[0]
    weight = e("Transpose", ctx.value(source, torch.float32), perm=[1, 0])
    ctx.lowered_as(node, "MatMul float32")
    y = e("MatMul", operand.fake, weight)
    return y if bias is None else e("Add", y, ctx.value(bias, torch.float32))


def _activation(ctx: Context, node: Node, x: Node, fmt: ScaledFormat, rounding: str,
                given: Sequence[Node] | None) -> Quantized:
    """The operand of x in this format; equal ones are shared."""
    static = _static(ctx, node, given)
    _check(ctx, node, fmt, rounding, static)
    key = ("quantized", x, str(fmt), tuple(given or ()))
    if key not in ctx.memo:
        tensorwide = fmt.granularity.kind in ("tensor", "channel")
        size = 0 if tensorwide and not isinstance(ctx.meta(x).shape[-1], int) else \
            _known_size(ctx, node, x, -1)
        ctx.memo[key] = Quantized(Emitter(ctx.builder), ctx.value(x, torch.float32), fmt,
                                  ctx.rank(x), size, static)
    return ctx.memo[key]


def _static(ctx: Context, node: Node, given: Sequence[Node] | None) -> list[torch.Tensor]:
    tensors = [ctx.tensor(part) for part in given or ()]
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) != len(tensors):
        raise LoweringError(f"{describe(node)}: given scales are computed when the graph runs; "
                            f"remedy: pass constants (buffers), or use dynamic scaling")
    return known


def _check(ctx: Context, node: Node, fmt: ScaledFormat, rounding: str,
           static: Sequence[torch.Tensor]) -> None:
    """Raise ``LoweringError`` for what cannot be computed when the graph runs."""
    if rounding != "nearest":
        raise LoweringError(f"{describe(node)}: rounding {rounding!r} at run time; remedy: use "
                            f"rounding='nearest' for inference, or backend='inductor'")
    why = rounds.why_not(fmt.element) or scale_rules.why_not(fmt, len(static))
    if why is not None:
        raise LoweringError(f"{describe(node)}: activations in {fmt}: {why}; remedy: another "
                            f"activation format, or backend='inductor' or 'reference'")


def _check_stored(node: Node, fmt: ScaledFormat) -> None:
    """Raise ``LoweringError`` for stored tensors that cannot be expanded."""
    why = why_not(fmt)
    if why is not None:
        raise LoweringError(f"{describe(node)}: stored as {fmt}: {why}; remedy: another format, or "
                            f"backend='inductor' or 'reference'")


def _known_size(ctx: Context, node: Node, x: Node, axis: int) -> int:
    size = ctx.meta(x).shape[axis]
    if not isinstance(size, int):
        raise LoweringError(f"{describe(node)}: the quantized axis {axis} has a dynamic size; "
                            f"remedy: mark that dimension static in dynamic_shapes")
    return size


def _size(ctx: Context, node: Node, size: Any) -> int:
    value = ctx.dim(size) if isinstance(size, Node) else size
    if not isinstance(value, int):
        raise LoweringError(f"{describe(node)}: the size {size} of a quantized axis is dynamic; "
                            f"remedy: mark that dimension static in dynamic_shapes")
    return value


def _rows(ctx: Context, x: Sequence[Node] | Node) -> int:
    """How many rows the left operand has in the example."""
    source = x if isinstance(x, Node) else x[0]
    if source.target is OPS.quantize.default:
        first = source.args[0]
        assert isinstance(first, Node)
        source = first
    rank = ctx.rank(source)
    return int(np.prod([ctx.hint(source, axis) for axis in range(rank - 1)], dtype=np.int64))


def _name(w: Sequence[Node] | Node, node: Node) -> str:
    """The weight's name in the file: the attribute that holds its codes."""
    first = w if isinstance(w, Node) else w[0]
    return str(first.target) if first.op == "get_attr" else f"{node.name}_weight"


