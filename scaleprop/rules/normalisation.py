"""Norms, softmax, reductions and pooling. A norm kills the scale of its input, up to its ε."""

from __future__ import annotations

from typing import Any

import torch

from scaleprop.rules import axes, laws
from scaleprop.rules.base import Homogeneity, Rule, register

aten: Any = torch.ops.aten

_NORM = "norms run in high precision"
_SOFTMAX = "softmax runs in high precision"

_NORMS = {
    aten.layer_norm.default: Homogeneity({0: 0, 2: 1}, follows=(3,), exact=False),
    aten.rms_norm.default: Homogeneity({0: 0, 2: 1}, exact=False),
    aten.group_norm.default: Homogeneity({0: 0, 2: 1}, follows=(3,), exact=False),
    aten.instance_norm.default: Homogeneity({0: 0, 1: 1}, follows=(2,), exact=False),
}
for _op, _homogeneity in _NORMS.items():
    register(
        Rule(
            op=_op,
            family="norm",
            homogeneity=_homogeneity,
            axes=axes.identity,
            high=_NORM,
            bounded=True,
        )
    )
register(
    Rule(
        op=aten._native_batch_norm_legit_no_training.default,
        family="norm",
        high=_NORM,
        bounded=True,
    )
)
for _op in (
    aten.softmax.int,
    aten.log_softmax.int,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten.logsumexp.default,
):
    register(Rule(op=_op, family="softmax", axes=axes.identity, high=_SOFTMAX, bounded=True))

# mean and reciprocal deviation come out with the norm; they are what the backward reads
for _op in (
    aten.native_layer_norm.default,
    aten.native_group_norm.default,
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._fused_rms_norm.default,
):
    register(Rule(op=_op, family="norm", high=_NORM, bounded=True))

# the mean of a loss comes with the weights it was divided by, which have no scale
for _op in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default):
    register(Rule(op=_op, family="reduction", homogeneity=Homogeneity(outputs=({0: 1}, {0: 0}))))
register(Rule(op=aten.var.correction, family="reduction", homogeneity=Homogeneity({0: 2})))
register(Rule(op=aten.var.dim, family="reduction", homogeneity=Homogeneity({0: 2})))
register(
    Rule(
        op=aten.var_mean.correction,
        family="reduction",
        homogeneity=Homogeneity(outputs=({0: 2}, {0: 1})),
    )
)
register(Rule(op=aten.linalg_vector_norm.default, family="reduction", homogeneity=laws.counted))
for _op in (aten.prod.default, aten.prod.dim_int):
    register(Rule(op=_op, family="reduction", homogeneity=laws.multiplied))
register(Rule(op=aten._cdist_forward.default, family="reduction", homogeneity=laws.distance))
# each element of what comes out is a product of another number of factors, or a logarithm
for _op in (aten.cumprod.default, aten.logcumsumexp.default):
    register(Rule(op=_op, family="reduction"))

for _op in (
    aten.mean.dim,
    aten.mean.default,
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.amax.default,
    aten.amin.default,
    aten.std.correction,
    aten.cumsum.default,
    aten.max.dim,
    aten.min.dim,
    aten.max.default,
    aten.min.default,
    aten.median.default,
    aten.median.dim,
    aten.kthvalue.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
    aten.adaptive_max_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.avg_pool3d.default,
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
):
    register(Rule(op=_op, family="reduction", homogeneity=Homogeneity({0: 1})))
