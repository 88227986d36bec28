"""Scaled dot-product attention, decomposed.

The opset-23 ``Attention`` operator costs the same on onnxruntime's CPU as ``MatMul``, ``Softmax``,
``MatMul`` (measured at 1×12×128×32 to 1×12×512×64: within 5 %), and like them it is four times
slower as soon as a mask hides something: exp of a masked score is subnormal. Spelled out, scores
can be floored before the softmax (see ``activations.floored``), which brings masked attention to
the speed of unmasked attention.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.aten.activations import SOFTMAX_FLOOR, floored
from scaleprop.backends.onnxruntime.context import Context, Node
from scaleprop.backends.onnxruntime.registry import lowers
from scaleprop.errors import LoweringError, describe

aten = torch.ops.aten


@lowers(aten.scaled_dot_product_attention.default)
def attention(
    ctx: Context, node: Node, query: Node, key: Node, value: Node, mask: Node | None = None,
    dropout: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:  # fmt: skip
    """softmax(q·kᵀ·scale + mask)·v over [..., L, E], [..., S, E], [..., S, Ev]."""
    if dropout:
        raise LoweringError(f"{describe(node)}: dropout {dropout}; remedy: call model.eval()")
    dtype, rank = ctx.dtype(node), ctx.rank(query)
    q, k, v = ctx.values((query, key, value), dtype)
    groups = _groups(ctx, node, query, key) if enable_gqa else 1
    if groups > 1:  # [B, H, L, E] as [B, H/G, G, L, E] against [B, H/G, 1, S, E]
        heads = ctx.meta(key).shape[-3]
        q = _split_heads(ctx, q, query, heads, groups)
        k, v = (ctx.op("Unsqueeze", part, ctx.ints([rank - 2])) for part in (k, v))
    factor = scale if scale is not None else 1.0 / math.sqrt(ctx.meta(query).shape[-1])
    order = [*range(ctx.rank(key) - 2 + (groups > 1)), -1, -2]
    turned = ctx.op("Transpose", k, perm=[axis % len(order) for axis in order])
    scores = ctx.op("MatMul", ctx.op("Mul", q, ctx.number(factor, dtype)), turned)
    if is_causal:
        biased = ctx.op("Add", scores, _causal_bias(ctx, query, key, dtype))
        probabilities = ctx.op("Softmax", floored(ctx, biased, -1, dtype)[0], axis=-1)
        result = ctx.op("MatMul", probabilities, v)
    elif mask is not None:
        result = _masked(ctx, scores, mask, v, dtype, groups)
    else:
        result = ctx.op("MatMul", ctx.op("Softmax", scores, axis=-1), v)
    ctx.lowered_as(node, "MatMul, Softmax, MatMul f32")
    if groups == 1:
        return result
    merged = [*ctx.sizes(query)[:-1], ctx.size(value, -1)]
    shape = ctx.shape_vector([*merged[:-2], -1, merged[-1]])
    return ctx.op("Reshape", result, shape)


def _groups(ctx: Context, node: Node, query: Node, key: Node) -> int:
    """How many query heads share one key head."""
    heads, shared = ctx.meta(query).shape[-3], ctx.meta(key).shape[-3]
    if not isinstance(heads, int) or not isinstance(shared, int):
        raise LoweringError(f"{describe(node)}: the number of heads is not fixed; "
                            f"remedy: fix that dimension in dynamic_shapes")
    return heads // shared


def _split_heads(ctx: Context, x: ir.Value, node: Node, heads: int, groups: int) -> ir.Value:
    sizes = ctx.sizes(node)
    return ctx.reshape(x, sizes, [*sizes[:-3], heads, groups, *sizes[-2:]])


def _causal_bias(ctx: Context, query: Node, key: Node, dtype: torch.dtype) -> ir.Value:
    """[L, S]: 0 where a query may look, −∞ above the diagonal; one for all layers."""
    length, total = ctx.size(query, -2), ctx.size(key, -2)
    memo = ("causal", length, total, dtype)
    if memo not in ctx.memo:
        if isinstance(length, int) and isinstance(total, int):
            hidden = torch.full((length, total), -math.inf, dtype=dtype).triu(1)
            ctx.memo[memo] = ctx.weight(hidden, "causal_bias")
        else:
            full = ctx.op("ConstantOfShape", ctx.shape_vector([length, total]),
                          value=ir.tensor(torch.tensor([-math.inf], dtype=dtype).numpy()))
            ctx.memo[memo] = ctx.op("Trilu", full, ctx.number(1, torch.int64), upper=1)
    return ctx.memo[memo]


def _masked(
    ctx: Context, scores: ir.Value, mask: Node, v: ir.Value, dtype: torch.dtype, groups: int
) -> ir.Value:
    """Attention under an explicit mask.

    A mask that hides nothing (a batch without padding) must not cost anything, so the floor is
    behind an ``If`` whose condition is computed once per mask. A query that may look at nothing
    gets zeros, as in torch.
    """
    bias, hides = _mask_bias(ctx, mask, dtype)
    if groups > 1:
        bias = _over_groups(ctx, bias, mask, groups)
    biased = ctx.op("Add", scores, bias)

    def plain() -> ir.Value:
        return ctx.op("MatMul", ctx.op("Softmax", biased, axis=-1), v)

    def with_floor() -> ir.Value:
        safe, largest = floored(ctx, biased, -1, dtype)
        dead = ctx.op("Equal", largest, ctx.number(-math.inf, dtype))
        result = ctx.op("MatMul", ctx.op("Softmax", safe, axis=-1), v)
        return ctx.op("Where", dead, ctx.number(0.0, dtype), result)

    return ctx.branch(hides, with_floor, plain, dtype)


def _mask_bias(ctx: Context, mask: Node, dtype: torch.dtype) -> tuple[ir.Value, ir.Value]:
    """The mask as something to add, and whether it hides anything; both once per mask."""
    memo = ("mask", ctx.value(mask), dtype)
    if memo not in ctx.memo:
        bias = ctx.value(mask)
        if ctx.dtype(mask) is torch.bool:
            bias = ctx.op("Where", bias, ctx.number(0.0, dtype), ctx.number(-math.inf, dtype))
        else:
            bias = ctx.cast(bias, ctx.dtype(mask), dtype)
        least = ctx.op("ReduceMin", bias, keepdims=0)
        hides = ctx.op("Less", least, ctx.number(-SOFTMAX_FLOOR, dtype))
        ctx.memo[memo] = (bias, hides)
    return ctx.memo[memo]


def _over_groups(ctx: Context, bias: ir.Value, mask: Node, groups: int) -> ir.Value:
    """A mask [B, 1 or H, L, S] for scores [B, H/G, G, L, S]."""
    if ctx.rank(mask) < 3:
        return bias
    sizes = ctx.sizes(mask)
    heads = sizes[-3]
    if heads == 1:
        return ctx.op("Unsqueeze", bias, ctx.ints([ctx.rank(mask) - 2]))
    if not isinstance(heads, int):
        raise LoweringError("attention: a mask with an unknown number of heads; "
                            "remedy: fix that dimension in dynamic_shapes")
    return ctx.reshape(bias, sizes, [*sizes[:-3], heads // groups, groups, *sizes[-2:]])



