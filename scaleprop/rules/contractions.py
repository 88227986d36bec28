"""Sums of products: linear layers, convolutions, lookups, matrix products, attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop.rules import axes
from scaleprop.rules.base import Contraction, Homogeneity, Operand, Rule, register

aten: Any = torch.ops.aten

_BILINEAR = Homogeneity({0: 1, 1: 1})
_BILINEAR_BIAS = Homogeneity({0: 1, 1: 1}, follows=(2,))

register(
    Rule(
        op=aten.linear.default,  # y[…, n] = Σ_k x[…, k]·w[n, k] + b[n]
        family="contraction",
        homogeneity=_BILINEAR_BIAS,
        axes=axes.all_but_last,
        contraction=Contraction(
            "linear",
            (
                Operand(0, "activation", (-1,)),
                Operand(1, "weight", (-1,)),
                Operand(2, "bias"),
            ),
        ),
    )
)


def _convolution(op: torch._ops.OpOverload, rank: int) -> None:  # pyright: ignore[reportPrivateUsage]
    """y[n, o, …] = Σ_{i, taps} x[n, i, …]·w[o, i, taps] + b[o]."""
    summed = tuple(range(-rank - 1, 0))
    operands = (
        Operand(0, "activation", (-rank - 1,)),
        Operand(1, "weight", summed),
        Operand(2, "bias"),
    )
    register(
        Rule(
            op=op,
            family="contraction",
            homogeneity=_BILINEAR_BIAS,
            axes=axes.first_only,
            contraction=Contraction("conv", operands),
        )
    )


_convolution(aten.conv1d.default, 1)
_convolution(aten.conv2d.default, 2)
_convolution(aten.conv3d.default, 3)



def _summed_axes(node: torch.fx.Node) -> tuple[tuple[int, ...], ...]:
    """Of aten.convolution(x, w, b, …, transposed, …): a transposed one's w is [i, o, taps]."""
    weight: Any = node.args[1]
    rank = weight.meta["val"].dim() - 2
    channels = -rank - 2 if node.args[6] else -rank - 1
    return (-rank - 1,), (channels, *range(-rank, 0)), ()


register(
    Rule(
        op=aten.convolution.default,
        family="contraction",
        homogeneity=_BILINEAR_BIAS,
        axes=axes.first_only,
        contraction=Contraction(
            "conv",
            (Operand(0, "activation"), Operand(1, "weight"), Operand(2, "bias")),
            axes_of=_summed_axes,
        ),
        high="a transposed convolution runs in high precision",
    )
)
register(
    Rule(
        op=aten.embedding.default,  # y[…, d] = w[ids[…], d]
        family="contraction",
        homogeneity=Homogeneity({0: 1}),
        contraction=Contraction("embedding", (Operand(0, "weight"),)),
    )
)

register(  # sums, means or maxima of rows; rows may come with weights
    Rule(
        op=aten._embedding_bag.default,
        family="contraction",
        homogeneity=Homogeneity({0: 1, 6: 1}),
        high="sums of rows run in high precision",
    )
)
register(
    Rule(
        op=aten._trilinear.default,
        family="contraction",
        homogeneity=Homogeneity({0: 1, 1: 1, 2: 1}),
        high="products of three factors run in high precision",
    )
)

_PRODUCT = Contraction("matmul", (Operand(0, "activation", (-1,)), Operand(1, "activation", (-2,))))
for _op in (aten.mm.default, aten.bmm.default, aten.matmul.default):
    register(
        Rule(
            op=_op,
            family="contraction",
            homogeneity=_BILINEAR,
            axes=axes.all_but_last,
            contraction=_PRODUCT,
            high=(
                "it is no linear operator (rows times a parameter of two dimensions); "
                "other products run in high precision"
            ),
        )
    )
for _op in (aten.addmm.default, aten.baddbmm.default):
    register(
        Rule(
            op=_op,
            family="contraction",
            homogeneity=Homogeneity({1: 1, 2: 1}, follows=(0,)),
            contraction=Contraction(
                "matmul",
                (
                    Operand(1, "activation", (-1,)),
                    Operand(2, "activation", (-2,)),
                    Operand(0, "bias"),
                ),
            ),
            high=(
                "it is no linear operator (rows times a parameter, plus a bias vector, neither "
                "scaled); other products run in high precision"
            ),
        )
    )

_ATTENTION = (  # linear in the values; queries and keys go through exp
    aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
for _op in _ATTENTION:
    _besides = len(_op._schema.returns) - 1  # log Σ e^score, and what only backward reads
    register(
        Rule(
            op=_op,
            family="contraction",
            homogeneity=Homogeneity(outputs=({2: 1}, *({2: 0},) * _besides))
            if _besides
            else Homogeneity({2: 1}),
            axes=axes.all_but_last,
            contraction=Contraction(
                "attention",
                (
                    Operand(0, "activation", (-1,)),
                    Operand(1, "activation", (-1,)),
                    Operand(2, "activation", (-2,)),
                ),
            ),
            high="attention runs in high precision",
        )
    )
