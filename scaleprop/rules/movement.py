"""Operators that move elements and compute nothing: every scale passes through them."""

from __future__ import annotations

import torch

from scaleprop.rules import axes
from scaleprop.rules.base import Homogeneity, Rule, register

aten = torch.ops.aten

_PASSES = Homogeneity({0: 1})

_WHOLE = {
    aten.view.default: axes.view,
    aten.reshape.default: axes.view,
    aten.permute.default: axes.permute,
    aten.transpose.int: axes.transpose,
    aten.unsqueeze.default: axes.unsqueeze,
    aten.expand.default: axes.expand,
    aten.clone.default: axes.identity,
    aten.alias.default: axes.identity,
    aten.squeeze.dims: axes.view,
}
for _op, _axes in _WHOLE.items():
    register(Rule(op=_op, family="movement", homogeneity=_PASSES, axes=_axes, moves=True))

for _op in (
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.unbind.int,
    aten.constant_pad_nd.default,
    aten.repeat.default,
    aten.flip.default,
    aten.tril.default,
    aten.triu.default,
):
    register(Rule(op=_op, family="movement", homogeneity=_PASSES))
for _op in (aten.cat.default, aten.stack.default):
    register(Rule(op=_op, family="movement", homogeneity=Homogeneity(follows=(0,))))
register(Rule(op=aten.where.self, family="movement", homogeneity=Homogeneity(follows=(1, 2))))
