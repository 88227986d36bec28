"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.views import transposed
from scaleprop.backends.onnxruntime.context import Arg, Context, Node
from scaleprop.backends.onnxruntime.registry import is_lowered, lowers
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten


@lowers(aten.linear.default)
def linear(ctx: Context, node: Node, x: Node, weight: Node, bias: Node | None = None
           ) -> ir.Value:  # fmt: skip
    """``MatMul`` with the weight stored as [K, N]: as fast as ``Gemm``, without reshapes."""
    product = ctx.op("MatMul", ctx.value(x), transposed_weight(ctx, weight))
    ctx.lowered_as(node, "MatMul f32")
    return product if bias is None else ctx.op("Add", product, ctx.value(bias))


def transposed_weight(ctx: Context, weight: Node) -> ir.Value:
    """A matrix [N, K] as [K, N]. A constant that only linears read is written transposed."""
    tensor = ctx.tensor(weight)
    if tensor is None or tensor.dim() != 2:
        order = [1, 0] if ctx.rank(weight) == 2 else [0]
        return transposed(ctx, ctx.value(weight), order)
    if ctx.is_shared(weight, among=(aten.linear.default,)):  # tied: stored once, as it is
        key = ("transposed", tensor.data_ptr())
        if key not in ctx.memo:
            ctx.memo[key] = transposed(ctx, ctx.value(weight), [1, 0])
        return ctx.memo[key]
    return ctx.weight(tensor.t(), weight.name)


@lowers(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default)
def matmul(ctx: Context, node: Node, x: Node, y: Node) -> ir.Value:
    dtype = ctx.dtype(node)
    if dtype.is_floating_point or dtype in (torch.int32, torch.int64):
        return ctx.op("MatMul", *ctx.values((x, y), dtype))
    raise LoweringError(f"{describe(node)}: no matrix product of {dtype}; remedy: cast to int32")


@lowers(aten.addmm.default, aten.baddbmm.default)
def addmm(ctx: Context, node: Node, bias: Node, x: Node, y: Node, *, beta: Arg = 1, alpha: Arg = 1
          ) -> ir.Value:  # fmt: skip
    dtype = ctx.dtype(node)
    product, term = ctx.op("MatMul", ctx.value(x), ctx.value(y)), ctx.value(bias)
    if alpha != 1:
        product = ctx.op("Mul", product, ctx.value(alpha, dtype))
    if beta != 1:
        term = ctx.op("Mul", term, ctx.value(beta, dtype))
    return ctx.op("Add", product, term)


@lowers(aten.bilinear.default)
def bilinear(ctx: Context, node: Node, x: Node, y: Node, weight: Node, bias: Node | None = None
             ) -> ir.Value:  # fmt: skip
    result = ctx.op("Einsum", *ctx.values((x, weight, y)), equation="...i,oij,...j->...o")
    return result if bias is None else ctx.op("Add", result, ctx.value(bias))


def _pair(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


@lowers(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
        aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)  # fmt: skip
def conv(
    ctx: Context, node: Node, x: Node, weight: Node, bias: Node | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> ir.Value:  # fmt: skip
    rank = ctx.rank(weight) - 2
    steps = _pair(dilation, rank)
    if padding == "same":  # the odd one goes to the end, as in torch
        total = [d * (k - 1) for d, k in zip(steps, ctx.meta(weight).shape[2:], strict=True)]
        pads = [extra // 2 for extra in total] + [extra - extra // 2 for extra in total]
    else:
        pads = 2 * _pair(0 if padding == "valid" else padding, rank)
    unbatched = ctx.rank(x) == rank + 1
    value = ctx.op("Unsqueeze", ctx.value(x), ctx.ints([0])) if unbatched else ctx.value(x)
    result = ctx.op("Conv", value, ctx.value(weight), None if bias is None else ctx.value(bias),
                    strides=_pair(stride, rank), pads=pads, dilations=steps, group=groups)
    ctx.lowered_as(node, "Conv f32")
    return ctx.op("Squeeze", result, ctx.ints([0])) if unbatched else result


@lowers(aten.convolution.default)
def convolution(
    ctx: Context, node: Node, x: Node, weight: Node, bias: Node | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], is_transposed: bool,
    output_padding: Sequence[int], groups: int,
) -> ir.Value:  # fmt: skip
    if not is_transposed:
        return conv(ctx, node, x, weight, bias, stride, padding, dilation, groups)
    rank = ctx.rank(weight) - 2
    ctx.lowered_as(node, "ConvTranspose f32")
    return ctx.op("ConvTranspose", ctx.value(x), ctx.value(weight),
                  None if bias is None else ctx.value(bias), strides=_pair(stride, rank),
                  pads=2 * _pair(padding, rank), dilations=_pair(dilation, rank), group=groups,
                  output_padding=_pair(output_padding, rank))


def grouped_mm(ctx: Context, node: Node, x: Node, weight: Node, offsets: Node) -> ir.Value:
    """Rows sorted by expert times the expert's matrix: one ``Slice`` and ``MatMul`` per expert.

    x: [S, K]; weight: [E, K, N]; offsets: [E], where each expert's rows end. Returns [S, N].
    """
    experts = ctx.meta(weight).shape[0]
    if not isinstance(experts, int):
        raise LoweringError(f"{describe(node)}: the number of experts is not fixed; "
                            f"remedy: fix that dimension in dynamic_shapes")
    value, matrices = ctx.value(x), ctx.tensor(weight)
    ends = ctx.builder.op("Split", ctx.value(offsets, torch.int64), axis=0, num_outputs=experts,
                          outputs=experts) if experts > 1 else [ctx.value(offsets, torch.int64)]
    start, rows = ctx.ints([0]), ctx.ints([0])
    products: list[ir.Value] = []
    for expert, end in enumerate(ends):
        matrix = (ctx.weight(matrices[expert], f"{weight.name}_{expert}") if matrices is not None
                  else ctx.op("Gather", ctx.value(weight), ctx.number(expert, torch.int64), axis=0))
        products.append(ctx.op("MatMul", ctx.op("Slice", value, start, end, rows), matrix))
        start = end
    ctx.lowered_as(node, f"MatMul f32, {experts} experts")
    return products[0] if experts == 1 else ctx.op("Concat", *products, axis=0)


def register_transformers() -> None:
    """Lowerings of operators that transformers defines, where it is installed and imported."""
    namespace = getattr(torch.ops, "transformers", None)
    packet = getattr(namespace, "grouped_mm_fallback", None)
    if packet is not None and not is_lowered(packet.default):
        lowers(packet.default)(grouped_mm)
