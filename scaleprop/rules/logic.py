"""Comparisons, masks, places and sizes: they read scales, and their results have none."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.rules import axes, laws
from scaleprop.rules.base import Homogeneity, Rule, register

aten: Any = torch.ops.aten

for _op in (
    aten.eq.Tensor,
    aten.ne.Tensor,
    aten.lt.Tensor,
    aten.le.Tensor,
    aten.gt.Tensor,
    aten.ge.Tensor,
):
    register(Rule(op=_op, family="logic", homogeneity=Homogeneity(follows=(0, 1)),
                  axes=axes.identity))  # fmt: skip
for _op in (
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
):
    register(Rule(op=_op, family="logic", homogeneity=laws.compared, axes=axes.identity))
for _op in (
    aten.isnan.default,
    aten.isinf.default,
    aten.signbit.default,
    aten.logical_not.default,
    aten.bitwise_not.default,
    aten.bitwise_and.Scalar,
    aten.bitwise_or.Scalar,
    aten.bitwise_xor.Scalar,
):
    register(Rule(op=_op, family="logic", homogeneity=Homogeneity({0: 0}), axes=axes.identity))
for _op in (
    aten.logical_and.default,
    aten.logical_or.default,
    aten.logical_xor.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
):
    register(Rule(op=_op, family="logic", homogeneity=Homogeneity({0: 0, 1: 0}),
                  axes=axes.identity))  # fmt: skip
for _op in (
    aten.argmax.default,
    aten.argmin.default,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.all.default,
    aten.all.dim,
    aten.nonzero.default,
):
    register(Rule(op=_op, family="logic", homogeneity=Homogeneity({0: 0})))
for _op in (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default,
            aten.sym_storage_offset.default, aten.sym_is_contiguous.default):  # fmt: skip
    register(Rule(op=_op, family="logic", homogeneity=Homogeneity({0: 0})))
