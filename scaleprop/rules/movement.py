"""Operators that move elements and compute nothing: every scale passes through them."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.rules import axes, laws
from scaleprop.rules.base import Homogeneity, Rule, register

aten: Any = torch.ops.aten

_WHOLE = {
    aten.view.default: axes.view,
    aten._unsafe_view.default: axes.view,
    aten.reshape.default: axes.view,
    aten.permute.default: axes.permute,
    aten.transpose.int: axes.transpose,
    aten.unsqueeze.default: axes.unsqueeze,
    aten.expand.default: axes.expand,
    aten.clone.default: axes.identity,
    aten.alias.default: axes.identity,
    aten.detach.default: axes.identity,
    aten.lift_fresh_copy.default: axes.identity,
    aten.squeeze.dims: axes.view,
}
for _op, _axes in _WHOLE.items():
    register(Rule(op=_op, family="movement", homogeneity=laws.PASSES, axes=_axes, moves=True))

for _op in (
    aten.t.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.roll.default,
    aten.flip.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
):
    register(Rule(op=_op, family="movement", homogeneity=laws.PASSES, moves=True))

for _op in (
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.split_with_sizes.default,
    aten.split.Tensor,
    aten.unbind.int,
    aten.repeat.default,
    aten.as_strided.default,
    aten.diagonal.default,
    aten.unfold.default,
    aten.im2col.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.tril.default,
    aten.triu.default,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
):
    register(Rule(op=_op, family="movement", homogeneity=laws.PASSES))

register(Rule(op=aten.constant_pad_nd.default, family="movement",
              homogeneity=laws.passes_with(2, "value", 0)))  # fmt: skip

# what is put somewhere, and what it is put into
_INTO = {
    aten.cat.default: Homogeneity(follows=(0,)),
    aten.stack.default: Homogeneity(follows=(0,)),
    aten.where.self: Homogeneity(follows=(1, 2)),
    aten.slice_scatter.default: Homogeneity(follows=(0, 1)),
    aten.select_scatter.default: Homogeneity(follows=(0, 1)),
    aten.as_strided_scatter.default: Homogeneity(follows=(0, 1)),
    aten.index_put.default: Homogeneity(follows=(0, 2)),
    aten._unsafe_index_put.default: Homogeneity(follows=(0, 2)),
    aten.scatter.src: Homogeneity(follows=(0, 3)),
    aten.scatter.value: laws.passes_with(3, "value"),
    aten.scatter_reduce.two: laws.gathered_up,
    aten.masked_scatter.default: Homogeneity(follows=(0, 2)),
    aten.scatter_add.default: Homogeneity(follows=(0, 3)),
    aten.index_add.default: Homogeneity(follows=(0, 3)),
}
for _op, _homogeneity in _INTO.items():
    register(Rule(op=_op, family="movement", homogeneity=_homogeneity))
