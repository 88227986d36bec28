"""Norms, softmax, reductions and pooling. A norm kills the scale of its input, up to its ε."""

from __future__ import annotations

import torch

from scaleprop.rules import axes
from scaleprop.rules.base import Homogeneity, Rule, register

aten = torch.ops.aten

_NORM = "norms run in high precision"
_SOFTMAX = "softmax runs in high precision"

_NORMS = {
    aten.layer_norm.default: Homogeneity({0: 0, 2: 1}, follows=(3,), exact=False),
    aten.rms_norm.default: Homogeneity({0: 0, 2: 1}, exact=False),
    aten.group_norm.default: Homogeneity({0: 0, 2: 1}, follows=(3,), exact=False),
    aten.instance_norm.default: Homogeneity({0: 0, 1: 1}, follows=(2,), exact=False),
}
for _op, _homogeneity in _NORMS.items():
    register(Rule(op=_op, family="norm", homogeneity=_homogeneity, axes=axes.identity, high=_NORM))
register(
    Rule(
        op=aten._native_batch_norm_legit_no_training.default,  # pyright: ignore[reportPrivateUsage]
        family="norm",
        high=_NORM,
    )
)
for _op in (
    aten.softmax.int,
    aten.log_softmax.int,
    aten._softmax.default,  # pyright: ignore[reportPrivateUsage]
    aten._log_softmax.default,  # pyright: ignore[reportPrivateUsage]
    aten._safe_softmax.default,  # pyright: ignore[reportPrivateUsage]
    aten.logsumexp.default,
):
    register(Rule(op=_op, family="softmax", axes=axes.identity, high=_SOFTMAX))

for _op in (
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.amax.default,
    aten.amin.default,
    aten.cumsum.default,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
):
    register(Rule(op=_op, family="reduction", homogeneity=Homogeneity({0: 1})))
