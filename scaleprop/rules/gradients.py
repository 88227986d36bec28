"""Backward operators: linear in the gradient that comes in, and mostly in nothing else.

What a forward operator saved is read unscaled, except where only its sign or its place counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scaleprop.rules import axes, laws
from scaleprop.rules.base import Contraction, Homogeneity, Law, Operand, Rule, register

aten: Any = torch.ops.aten

_LINEAR = Homogeneity({0: 1})

_ELEMENTWISE: Mapping[Any, Law] = {
    aten.threshold_backward.default: laws.threshold_gradient,
    aten.leaky_relu_backward.default: Homogeneity({0: 1, 1: 0}),  # the sign of x decides
    aten.gelu_backward.default: _LINEAR,
    aten.silu_backward.default: _LINEAR,
    aten.mish_backward.default: _LINEAR,
    aten.elu_backward.default: _LINEAR,
    aten.sigmoid_backward.default: _LINEAR,
    aten.tanh_backward.default: _LINEAR,
    aten.hardtanh_backward.default: _LINEAR,
    aten.hardswish_backward.default: _LINEAR,
    aten.hardsigmoid_backward.default: _LINEAR,
    aten.softplus_backward.default: _LINEAR,
    aten.log_sigmoid_backward.default: _LINEAR,
    aten._softmax_backward_data.default: _LINEAR,
    aten._log_softmax_backward_data.default: _LINEAR,
    aten.native_dropout_backward.default: _LINEAR,
}
for _op, _homogeneity in _ELEMENTWISE.items():
    register(Rule(op=_op, family="gradient", homogeneity=_homogeneity, axes=axes.identity))

_SHAPED: Mapping[Any, Law] = {
    aten.glu_backward.default: _LINEAR,
    aten.embedding_dense_backward.default: _LINEAR,
    aten.native_layer_norm_backward.default: _LINEAR,
    aten.native_group_norm_backward.default: _LINEAR,
    aten.native_batch_norm_backward.default: _LINEAR,
    aten._fused_rms_norm_backward.default: _LINEAR,
    # where a label is; the summed class weights must be as they are
    aten.nll_loss_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.nll_loss2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.avg_pool2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten._adaptive_avg_pool2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.avg_pool3d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten._adaptive_avg_pool3d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.adaptive_max_pool2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.max_pool3d_with_indices_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.max_pool2d_with_indices_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.upsample_nearest2d_backward.default: _LINEAR,
    aten.upsample_bilinear2d_backward.default: _LINEAR,
    aten.slice_backward.default: _LINEAR,
    aten.select_backward.default: _LINEAR,
    aten.diagonal_backward.default: _LINEAR,
    aten.unfold_backward.default: _LINEAR,
    aten.col2im.default: _LINEAR,
    aten.reflection_pad1d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.reflection_pad2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.reflection_pad3d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.replication_pad1d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.replication_pad2d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.replication_pad3d_backward.default: Homogeneity({0: 1, 1: 0}),
    aten.masked_scatter_backward.default: _LINEAR,
    aten._cdist_backward.default: _LINEAR,
    aten._embedding_bag_backward.default: Homogeneity({0: 1, 10: 1}),
    aten._embedding_bag_per_sample_weights_backward.default: Homogeneity({0: 1, 1: 1}),
    aten.mse_loss_backward.default: _LINEAR,
}  # fmt: skip
for _op, _homogeneity in _SHAPED.items():
    register(Rule(op=_op, family="gradient", homogeneity=_homogeneity))

register(  # dx from dy and w, dw from dy and x, db from dy
    Rule(
        op=aten.convolution_backward.default,
        family="gradient",
        homogeneity=Homogeneity(
            outputs=({0: 1, 1: 0, 2: 1}, {0: 1, 1: 1, 2: 0}, {0: 1, 1: 0, 2: 0})
        ),
        gradient_of=Contraction(
            "conv", (Operand(0, "gradient"), Operand(1, "activation"), Operand(2, "weight"))
        ),
    )
)
for _op in (
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
):
    register(
        Rule(
            op=_op,  # of (dO, q, k, v, …)
            family="gradient",
            homogeneity=_LINEAR,
            gradient_of=Contraction(
                "attention",
                (Operand(0, "gradient"), *(Operand(place, "activation") for place in (1, 2, 3))),
            ),
        )
    )
