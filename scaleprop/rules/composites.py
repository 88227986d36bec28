"""Composites that only training graphs hold: ``torch.export`` keeps them, core ATen has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop.rules import laws
from scaleprop.rules.base import Contraction, Homogeneity, Operand, Rule, register

aten: Any = torch.ops.aten


def _where(node: torch.fx.Node) -> Homogeneity | None:
    """where(condition, x, number): zeros and infinities are the same at every scale."""
    return Homogeneity({1: 1}) if laws.scale_free(node.args[2]) else None


def _pad(node: torch.fx.Node) -> Homogeneity | None:
    """pad(x, sizes, mode, value)."""
    if laws.constant(node, 2, "mode", "constant") != "constant":
        return laws.PASSES
    value = laws.constant(node, 3, "value")
    return laws.PASSES if value is None or laws.scale_free(value) else None


for _op in (
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.repeat_interleave.self_int,
    aten.swapaxes.default,
    aten.movedim.intlist,
    aten.view_as.default,
    aten.reshape_as.default,
):
    register(Rule(op=_op, family="movement", homogeneity=laws.PASSES, moves=True))
for _op in (aten.chunk.default, aten.narrow.default):
    register(Rule(op=_op, family="movement", homogeneity=laws.PASSES))
register(Rule(op=aten.where.ScalarOther, family="movement", homogeneity=_where))
register(Rule(op=aten.pad.default, family="movement", homogeneity=_pad))
register(Rule(op=aten.to.dtype, family="cast", homogeneity=laws.cast))
register(Rule(op=aten.to.dtype_layout, family="cast", homogeneity=laws.cast))
register(Rule(op=aten.type_as.default, family="cast", homogeneity=laws.cast))
register(Rule(op=aten.adaptive_avg_pool1d.default, family="reduction", homogeneity=laws.PASSES))
register(Rule(op=aten.avg_pool1d.default, family="reduction", homogeneity=laws.PASSES))
register(Rule(op=aten.max_pool1d.default, family="reduction", homogeneity=laws.PASSES))
register(
    Rule(
        op=aten.batch_norm.default,  # in training; in eval the running deviation is a constant
        family="norm",
        homogeneity=Homogeneity({1: 1}, follows=(2,), exact=False),
        high="norms run in high precision",
        bounded=True,
    )
)
_BILINEAR = Homogeneity({0: 1, 1: 1}, follows=(2,))
for _op, _axes in (
    (aten.conv1d.padding, (-2, -1)),
    (aten.conv2d.padding, (-3, -2, -1)),
    (aten.conv3d.padding, (-4, -3, -2, -1)),
):
    _operands = (Operand(0, "activation", _axes[:1]), Operand(1, "weight", _axes),
                 Operand(2, "bias"))
    register(Rule(op=_op, family="contraction", homogeneity=_BILINEAR,
                  contraction=Contraction("conv", _operands)))
