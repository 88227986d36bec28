"""Elementwise operators: sums align scales, products multiply them, the rest need none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scaleprop.rules import axes, laws
from scaleprop.rules.base import Homogeneity, Law, Rule, register

aten: Any = torch.ops.aten

_HOMOGENEITY: Mapping[Any, Law] = {
    aten.add.Tensor: Homogeneity(follows=(0, 1)),
    aten.sub.Tensor: Homogeneity(follows=(0, 1)),
    aten.add.Scalar: laws.shifted,
    aten.sub.Scalar: laws.shifted,
    aten.rsub.Scalar: laws.shifted,
    aten.mul.Tensor: Homogeneity({0: 1, 1: 1}),
    aten.div.Tensor: Homogeneity({0: 1, 1: -1}),
    aten.div.Tensor_mode: laws.quotient,
    aten.mul.Scalar: Homogeneity({0: 1}),
    aten.div.Scalar: Homogeneity({0: 1}),
    aten.fmod.Tensor: Homogeneity(follows=(0, 1)),
    aten.remainder.Tensor: Homogeneity(follows=(0, 1)),
    aten.addcmul.default: Homogeneity({1: 1, 2: 1}, follows=(0,)),
    aten.addcdiv.default: Homogeneity({1: 1, 2: -1}, follows=(0,)),
    aten.lerp.Scalar: Homogeneity(follows=(0, 1)),
    aten.neg.default: Homogeneity({0: 1}),
    aten.abs.default: Homogeneity({0: 1}),
    aten.relu.default: Homogeneity({0: 1}),
    aten.leaky_relu.default: Homogeneity({0: 1}),
    aten._prelu_kernel.default: Homogeneity({0: 1}),
    aten.copysign.Tensor: Homogeneity({0: 1, 1: 0}),
    aten.copysign.Scalar: Homogeneity({0: 1}),
    aten.hypot.default: Homogeneity(follows=(0, 1)),
    aten.sign.default: Homogeneity({0: 0}),
    aten.sgn.default: Homogeneity({0: 0}),
    aten.maximum.default: Homogeneity(follows=(0, 1)),
    aten.minimum.default: Homogeneity(follows=(0, 1)),
    aten.reciprocal.default: Homogeneity({0: -1}),
    aten.square.default: Homogeneity({0: 2}),
    aten.pow.Tensor_Scalar: laws.power,
    aten.clamp.default: laws.clamp,
    aten.clamp.Tensor: Homogeneity(follows=(0, 1, 2)),
    aten.clamp_min.Tensor: Homogeneity(follows=(0, 1)),
    aten.clamp_max.Tensor: Homogeneity(follows=(0, 1)),
    aten.clamp_min.default: laws.shifted,
    aten.clamp_max.default: laws.shifted,
    aten.masked_fill.Scalar: laws.passes_with(2, "value"),
    aten.copy.default: Homogeneity({0: 0, 1: 1}),
    aten.native_dropout.default: Homogeneity({0: 1}),
    aten.dropout.default: Homogeneity({0: 1}),
}
for _op, _homogeneity in _HOMOGENEITY.items():
    register(Rule(op=_op, family="elementwise", homogeneity=_homogeneity, axes=axes.identity))

for _op in (
    aten.exp.default,
    aten.exp2.default,
    aten.expm1.default,
    aten.log.default,
    aten.log2.default,
    aten.log10.default,
    aten.log1p.default,
    aten.log_sigmoid_forward.default,
    aten.gelu.default,
    aten.silu.default,
    aten.mish.default,
    aten.elu.default,
    aten.celu.default,
    aten.softplus.default,
    aten.hardtanh.default,
    aten.hardswish.default,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    aten.floor.default,
    aten.ceil.default,
    aten.round.default,
    aten.trunc.default,
    aten.fmod.Scalar,
    aten.remainder.Scalar,
    aten.div.Scalar_mode,
    aten.tan.default,
    aten.sinh.default,
    aten.cosh.default,
    aten.asinh.default,
    aten.acosh.default,
    aten.atanh.default,
    aten.lgamma.default,
    aten.digamma.default,
    aten.glu.default,
):
    register(Rule(op=_op, family="elementwise", axes=axes.identity))

for _op, _degree in ((aten.sqrt.default, 0.5), (aten.rsqrt.default, -0.5)):
    register(Rule(op=_op, family="elementwise", axes=axes.identity, degree=_degree))

for _op in (
    aten.tanh.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.erf.default,
    aten.erfc.default,
    aten.cos.default,
    aten.sin.default,
    aten.asin.default,
    aten.acos.default,
    aten.atan.default,
    aten.atan2.default,
):
    register(Rule(op=_op, family="elementwise", axes=axes.identity, bounded=True))

register(Rule(op=aten._to_copy.default, family="cast", homogeneity=laws.cast, axes=axes.identity))
