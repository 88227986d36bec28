"""Elementwise operators: sums align scales, products multiply them, the rest need none."""

from __future__ import annotations

import torch

from scaleprop.rules import axes
from scaleprop.rules.base import Homogeneity, Rule, register

aten = torch.ops.aten

_HOMOGENEITY = {
    aten.add.Tensor: Homogeneity(follows=(0, 1)),
    aten.sub.Tensor: Homogeneity(follows=(0, 1)),
    aten.mul.Tensor: Homogeneity({0: 1, 1: 1}),
    aten.div.Tensor: Homogeneity({0: 1, 1: -1}),
    aten.mul.Scalar: Homogeneity({0: 1}),
    aten.div.Scalar: Homogeneity({0: 1}),
    aten.neg.default: Homogeneity({0: 1}),
    aten.abs.default: Homogeneity({0: 1}),
    aten.relu.default: Homogeneity({0: 1}),
    aten.leaky_relu.default: Homogeneity({0: 1}),
    aten.sign.default: Homogeneity({0: 0}),
    aten.maximum.default: Homogeneity(follows=(0, 1)),
    aten.minimum.default: Homogeneity(follows=(0, 1)),
    aten.reciprocal.default: Homogeneity({0: -1}),
}
for _op, _homogeneity in _HOMOGENEITY.items():
    register(Rule(op=_op, family="elementwise", homogeneity=_homogeneity, axes=axes.identity))

for _op in (
    aten.exp.default,
    aten.log.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.softplus.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.erf.default,
    aten.cos.default,
    aten.sin.default,
    aten.pow.Tensor_Scalar,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.clamp.default,
):
    register(Rule(op=_op, family="elementwise", axes=axes.identity))

# a cast may round or leave the reals, so it takes plain tensors only
register(Rule(op=getattr(aten, "_to_copy").default, family="cast", axes=axes.identity))  # noqa: B009
