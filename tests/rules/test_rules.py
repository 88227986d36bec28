"""Rules say the truth: homogeneity and axis maps are checked against the operators themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaleprop import ops
from scaleprop._torch_compat import fake_size, symbolic_fake_mode
from scaleprop.errors import ConfigError
from scaleprop.passes.capture import capture
from scaleprop.rules import Rule, contraction_of, coverage, register, rule_for
from scaleprop.rules.axes import match_axes

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
M = Y[0]  # [3, 4]
IMAGE = torch.randn(2, 4, 6, 6, dtype=torch.float64)

# operator → arguments to try it with
EXAMPLES = {
    aten.linear.default: (X, M, M[:, 0]),
    aten.conv1d.default: (X, Y[:, :, :2], Y[0, :2, 0]),
    aten.conv2d.default: (IMAGE, IMAGE[:, :, :3, :3], IMAGE[0, 0, 0, :2]),
    aten.conv3d.default: (IMAGE[None], IMAGE[:, None, :2, :2, :2].expand(2, 2, 2, 2, 2)),
    aten.convolution.default: (X, Y[:, :, :2], None, [1], [0], [1], False, [0], 1),
    aten.embedding.default: (M, torch.tensor([0, 2])),
    aten.mm.default: (M, M.t()),
    aten.bmm.default: (X, Y.mT),
    aten.matmul.default: (X, M.t()),
    aten.addmm.default: (M[:, :3], M, M.t()),
    aten.baddbmm.default: (X[:, :, :3], X, Y.mT),
    aten.scaled_dot_product_attention.default: (X, Y, X + Y),
    aten.view.default: (X, [6, 4]),
    aten.reshape.default: (X, [6, 4]),
    aten.permute.default: (X, [2, 0, 1]),
    aten.transpose.int: (X, 0, 2),
    aten.unsqueeze.default: (X, 1),
    aten.expand.default: (X[:1], [2, 3, 4]),
    aten.clone.default: (X,),
    aten.alias.default: (X,),
    aten.squeeze.dims: (X[:1], [0]),
    aten.slice.Tensor: (X, 1, 0, 2),
    aten.select.int: (X, 1, 0),
    aten.index.Tensor: (X, [torch.tensor([1, 0])]),
    aten.index_select.default: (X, 1, torch.tensor([2])),
    aten.gather.default: (X, 1, torch.zeros(2, 1, 4, dtype=torch.int64)),
    aten.split_with_sizes.default: (X, [1, 3], -1),
    aten.split.Tensor: (X, 2, -1),
    aten.unbind.int: (X, 1),
    aten.constant_pad_nd.default: (X, [1, 1]),
    aten.repeat.default: (X, [1, 2, 1]),
    aten.flip.default: (X, [0]),
    aten.tril.default: (X,),
    aten.triu.default: (X,),
    aten.cat.default: ([X, Y], 1),
    aten.stack.default: ([X, Y], 1),
    aten.where.self: (X > 0, X, Y),
    aten.add.Tensor: (X, Y),
    aten.sub.Tensor: (X, Y),
    aten.mul.Tensor: (X, Y),
    aten.div.Tensor: (X, Y),
    aten.mul.Scalar: (X, 2.0),
    aten.div.Scalar: (X, 2.0),
    aten.maximum.default: (X, Y),
    aten.minimum.default: (X, Y),
    aten.layer_norm.default: (X, [4], M[0], M[1]),
    aten.rms_norm.default: (X, [4], M[0]),
    aten.group_norm.default: (X, 1, M[:, 0], M[:, 1]),
    aten.instance_norm.default: (X, M[:, 0], M[:, 1], None, None, True, 0.1, 1e-5, False),
    aten.mean.dim: (X, [1]),
    aten.sum.dim_IntList: (X, [1]),
    aten.amax.default: (X, [1]),
    aten.amin.default: (X, [1]),
    aten.cumsum.default: (X, 1),
    aten.max_pool2d.default: (IMAGE, [2, 2]),
    aten.adaptive_avg_pool2d.default: (IMAGE, [2, 2]),
    aten.avg_pool2d.default: (IMAGE, [2, 2]),
    aten.upsample_nearest2d.vec: (IMAGE, [12, 12], None),
    aten.upsample_bilinear2d.vec: (IMAGE, [12, 12], False, None),
}
# backward operators, and those that also return what the backward reads
GRID = torch.arange(8.0, dtype=torch.float64).reshape(2, 4)
LABELS = torch.tensor([1, 0, 3])
STATISTICS = aten.native_layer_norm(Y, [4], None, None, 1e-5)[1:]
GROUPED = aten.native_group_norm(IMAGE + 1, None, None, 2, 4, 36, 2, 1e-5)[1:]
POOLED, PLACES = aten.max_pool2d_with_indices(IMAGE, [2, 2])
OUT, LSE = aten._scaled_dot_product_flash_attention_for_cpu(X[None], Y[None], X[None] + 1)
BOTH = [True, True, True]
EXAMPLES |= {  # composites of training graphs
    aten.flatten.using_ints: (X, 1, 2),
    aten.unflatten.int: (X, 2, [2, 2]),
    aten.repeat_interleave.self_int: (X, 2, 1),
    aten.swapaxes.default: (X, 0, 2),
    aten.movedim.intlist: (X, [0], [2]),
    aten.view_as.default: (X, Y.flatten(1).unflatten(1, (3, 4))),
    aten.reshape_as.default: (X, Y),
    aten.chunk.default: (X, 2, -1),
    aten.narrow.default: (X, 1, 0, 2),
    aten.where.ScalarOther: (X > 0, X, 0.0),
    aten.pad.default: (X, [1, 1]),
    aten.to.dtype: (X, torch.float32),
    aten.to.dtype_layout: (X,),
    aten.type_as.default: (X, Y.float()),
    aten.adaptive_avg_pool1d.default: (X, [2]),
    aten.avg_pool1d.default: (X, [2]),
    aten.max_pool1d.default: (X, [2]),
    aten.batch_norm.default: (X, M[:, 0], M[:, 1], None, None, True, 0.1, 1e-5, False),
    aten.conv1d.padding: (X, Y[:, :, :2], None, [1], "same"),
    aten.conv2d.padding: (IMAGE, IMAGE[:, :, :3, :3], None, [1, 1], "same"),
    aten.conv3d.padding: (IMAGE[None], IMAGE[:, None, :2, :2, :2].expand(2, 2, 2, 2, 2), None,
                          [1, 1, 1], "same"),
}
EXAMPLES |= {
    aten.add.Scalar: (X, 0),
    aten.sub.Scalar: (X, 0.0),
    aten.rsub.Scalar: (X, 0),
    aten.fmod.Tensor: (X, Y.abs() + 1),
    aten.remainder.Tensor: (X, Y.abs() + 1),
    aten.addcmul.default: (X, Y, X),
    aten.addcdiv.default: (X, Y, X),
    aten.lerp.Scalar: (X, Y, 0.3),
    aten._prelu_kernel.default: (X, Y[0, 0]),
    aten.pow.Tensor_Scalar: (X, 3),
    aten.clamp.default: (X, 0, None),
    aten.clamp_min.default: (X, 0),
    aten.clamp_max.default: (X, 0.0),
    aten.masked_fill.Scalar: (X, X > 0, float("-inf")),
    aten.copy.default: (X, Y),
    aten.native_dropout.default: (X, 0.0, True),
    aten.dropout.default: (X, 0.5, False),
    aten._to_copy.default: (X,),
    aten._unsafe_view.default: (X, [6, 4]),
    aten.t.default: (M,),
    aten.squeeze.dim: (X[:1], 0),
    aten.roll.default: (X, [1], [0]),
    aten.pixel_shuffle.default: (IMAGE, 2),
    aten.pixel_unshuffle.default: (IMAGE, 2),
    aten._unsafe_index.Tensor: (X, [torch.tensor([1, 0])]),
    aten.as_strided.default: (X, [2, 2], [4, 1]),
    aten.diagonal.default: (M,),
    aten.unfold.default: (X, 1, 2, 1),
    aten.im2col.default: (IMAGE, [2, 2], [1, 1], [0, 0], [1, 1]),
    aten.reflection_pad2d.default: (IMAGE, [1, 1, 1, 1]),
    aten.replication_pad2d.default: (IMAGE, [1, 1, 1, 1]),
    aten.topk.default: (X, 2),
    aten.slice_scatter.default: (X, Y[:1], 0, 0, 1),
    aten.select_scatter.default: (X, Y[0], 0, 0),
    aten.as_strided_scatter.default: (X, M, [3, 4], [4, 1]),
    aten.index_put.default: (X, [torch.tensor([1])], Y[:1]),
    aten._unsafe_index_put.default: (X, [torch.tensor([1])], Y[:1]),
    aten.scatter.src: (X, 0, torch.zeros(2, 3, 4, dtype=torch.int64), Y),
    aten.scatter.value: (X, 0, torch.zeros(1, 3, 4, dtype=torch.int64), 0.0),
    aten.scatter_add.default: (X, 0, torch.zeros(2, 3, 4, dtype=torch.int64), Y),
    aten.index_add.default: (X, 0, torch.tensor([1]), Y[:1]),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (X[None], Y[None], X[None] + 1),
    aten.max.dim: (X, 1),
    aten.min.dim: (X, 1),
    aten._adaptive_avg_pool2d.default: (IMAGE, [2, 2]),
    aten.max_pool2d_with_indices.default: (IMAGE, [2, 2]),
    aten.nll_loss_forward.default: (M, LABELS, M[0].abs(), 1, -100),
    aten.nll_loss2d_forward.default: (IMAGE, IMAGE[:, 0].gt(0).long(), None, 1, -100),
    aten.linalg_vector_norm.default: (X, 2, [1]),
    aten.threshold_backward.default: (X, Y, 0),
    aten.leaky_relu_backward.default: (X, Y, 0.1, False),
    aten.gelu_backward.default: (X, Y),
    aten.silu_backward.default: (X, Y),
    aten.mish_backward.default: (X, Y),
    aten.elu_backward.default: (X, 1.0, 1.0, 1.0, False, Y),
    aten.sigmoid_backward.default: (X, Y),
    aten.tanh_backward.default: (X, Y),
    aten.hardtanh_backward.default: (X, Y, -1.0, 1.0),
    aten.hardswish_backward.default: (X, Y),
    aten.hardsigmoid_backward.default: (X, Y),
    aten.softplus_backward.default: (X, Y, 1.0, 20.0),
    aten.log_sigmoid_backward.default: (X, Y, Y),
    aten._softmax_backward_data.default: (X, Y, -1, torch.float64),
    aten._log_softmax_backward_data.default: (X, Y, -1, torch.float64),
    aten.native_dropout_backward.default: (X, Y > 0, 2.0),
    aten.glu_backward.default: (X[..., :2], Y, -1),
    aten.embedding_dense_backward.default: (M, LABELS, 5, -1, False),
    aten.native_layer_norm_backward.default: (X, Y, [4], *STATISTICS, M[0].clone(), M[1].clone(),
                                              BOTH),
    aten.native_group_norm_backward.default: (IMAGE, IMAGE + 1, *GROUPED, GRID[0], 2, 4, 36, 2,
                                              BOTH),
    aten.native_batch_norm_backward.default: (X, Y, M[:, 0], None, None, M[:, 1], M[:, 2], True,
                                              1e-5, BOTH),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        X[None], X[None], Y[None], X[None] + 1, OUT, LSE, 0.0, False),
    aten.nll_loss_backward.default: (M[0, 0], M, LABELS, None, 1, -100, M[1, 1]),
    aten.nll_loss2d_backward.default: (M[0, 0], IMAGE, IMAGE[:, 0].gt(0).long(), None, 1, -100,
                                       M[1, 1]),
    aten.avg_pool2d_backward.default: (POOLED, IMAGE, [2, 2], [2, 2], [0, 0], False, True, None),
    aten._adaptive_avg_pool2d_backward.default: (POOLED, IMAGE),
    aten.max_pool2d_with_indices_backward.default: (POOLED, IMAGE, [2, 2], [2, 2], [0, 0], [1, 1],
                                                    False, PLACES),
    aten.upsample_nearest2d_backward.default: (IMAGE, [6, 6], [2, 4, 3, 3]),
    aten.upsample_bilinear2d_backward.default: (IMAGE, [6, 6], [2, 4, 3, 3], False),
    aten.slice_backward.default: (X[:1], [2, 3, 4], 0, 0, 1, 1),
    aten.select_backward.default: (X[0], [2, 3, 4], 0, 0),
    aten.diagonal_backward.default: (M[:, 0], [3, 4], 0, 0, 1),
    aten.unfold_backward.default: (Y[:, :, :2, None].expand(2, 3, 2, 2), [2, 3, 3], 2, 2, 1),
    aten.col2im.default: (aten.im2col(IMAGE, [2, 2], [1, 1], [0, 0], [1, 1]), [6, 6], [2, 2],
                          [1, 1], [0, 0], [1, 1]),
    aten.reflection_pad2d_backward.default: (IMAGE, IMAGE[..., 1:-1, 1:-1], [1, 1, 1, 1]),
    aten.replication_pad2d_backward.default: (IMAGE, IMAGE[..., 1:-1, 1:-1], [1, 1, 1, 1]),
    aten.convolution_backward.default: (
        Y[:, :2, :3], X, Y[:, :, :2], [2], [1], [0], [1], False, [0], 1, BOTH),
    aten.mse_loss_backward.default: (X, Y, X + 1, 1),
    aten.clamp.Tensor: (X, Y, Y + 1),
    aten.clamp_min.Tensor: (X, Y),
    aten.clamp_max.Tensor: (X, Y),
    aten.copysign.Tensor: (X, Y),
    aten.copysign.Scalar: (X, -1.0),
    aten.hypot.default: (X, Y),
    aten.reflection_pad1d.default: (X, [1, 2]),
    aten.replication_pad1d.default: (X, [1, 2]),
    aten.reflection_pad3d.default: (IMAGE, [1, 1, 1, 1, 2, 0]),
    aten.replication_pad3d.default: (IMAGE, [1, 1, 1, 1, 2, 0]),
    aten.scatter_reduce.two: (X, 0, torch.zeros(2, 3, 4, dtype=torch.int64), Y, "amax"),
    aten.masked_scatter.default: (X, X > 0, Y),
    aten.masked_scatter_backward.default: (X, Y > 0, [3, 8]),
    aten.prod.default: (M,),
    aten.prod.dim_int: (X, 1),
    aten._cdist_forward.default: (X, Y, 1.0, None),
    aten._cdist_backward.default: (X[:, :, :3], X, Y, 2.0, X[:, :, 1:].abs() + 1),
    aten.kthvalue.default: (X, 2),
    aten.median.dim: (X, 1),
    aten.var.dim: (X, [1]),
    aten.cummax.default: (X, 1),
    aten.cummin.default: (X, 1),
    aten.max_pool3d_with_indices.default: (IMAGE, [2, 2, 2]),
    aten.adaptive_max_pool2d.default: (IMAGE, [2, 2]),
    aten._adaptive_avg_pool3d.default: (IMAGE, [2, 2, 2]),
    aten.avg_pool3d.default: (IMAGE, [2, 2, 2]),
    aten.avg_pool3d_backward.default: (IMAGE[:, ::2, ::2, ::2], IMAGE, [2, 2, 2], [2, 2, 2],
                                       [0, 0, 0], False, True, None),
    aten._adaptive_avg_pool3d_backward.default: (IMAGE[:, ::2, ::2, ::2], IMAGE),
    aten.adaptive_max_pool2d_backward.default: (
        IMAGE[:, :, :2, :2], IMAGE, aten.adaptive_max_pool2d(IMAGE, [2, 2])[1]),
    aten.max_pool3d_with_indices_backward.default: (
        IMAGE[:, ::2, ::2, ::2], IMAGE, [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False,
        aten.max_pool3d_with_indices(IMAGE, [2, 2, 2])[1]),
    aten.reflection_pad1d_backward.default: (X, X[..., 1:-1], [1, 1]),
    aten.replication_pad1d_backward.default: (X, X[..., 1:-1], [1, 1]),
    aten.reflection_pad3d_backward.default: (IMAGE, IMAGE[:, 1:-1, 1:-1, 1:-1], [1] * 6),
    aten.replication_pad3d_backward.default: (IMAGE, IMAGE[:, 1:-1, 1:-1, 1:-1], [1] * 6),
    aten._embedding_bag.default: (M, LABELS % 3, torch.tensor([0, 2]), False, 0, False, M[0, :3]),
    aten._embedding_bag_backward.default: (
        M[:2], LABELS % 3, torch.tensor([0, 2]), torch.tensor([0, 0, 1]), torch.tensor([2, 1]),
        torch.tensor([0, 0]), 3, False, 0, False, M[0, :3].clone()),
    aten._embedding_bag_per_sample_weights_backward.default: (
        M[:2].clone(), M, LABELS % 3, torch.tensor([0, 2]), torch.tensor([0, 0, 1]), 0),
    aten._trilinear.default: (X, Y, X + Y, [], [], [], [2]),
    aten.sym_is_contiguous.default: (X,),
    aten.any.dims: (X > 0, [0, 1]),
    ops.gemm: (M.float(), M.t().float(), 0.5, torch.float32),
    aten.sym_size.int: (X, 1),
    aten.sym_stride.int: (X, 1),
    aten.eq.Scalar: (X, 0),
    aten.full.default: ([2], 3.0),
    aten.zeros.default: ([2],),
    aten.ones.default: ([2],),
    aten.arange.default: (3,),
    aten.arange.start: (1, 3),
    aten.arange.start_step: (1, 3, 1),
    aten.scalar_tensor.default: (2.0,),
    aten.eye.default: (3,),
    aten.full_like.default: (X, 3.0),
    aten.new_zeros.default: (X, [2]),
    aten.new_ones.default: (X, [2]),
    aten.new_full.default: (X, [2], 3.0),
} | {op: (X > 0, Y > 0) for op in (aten.logical_and.default, aten.logical_or.default,
                                  aten.logical_xor.default, aten.bitwise_xor.Tensor,
                                  aten.bitwise_and.Tensor, aten.bitwise_or.Tensor)} | {
    op: (X > 0, True) for op in (aten.bitwise_and.Scalar, aten.bitwise_or.Scalar,
                                 aten.bitwise_xor.Scalar)} | {
    op: (X > 0,) for op in (aten.bitwise_not.default, aten.any.default, aten.all.default)} | {
    op: (X > 0, 1) for op in (aten.any.dim, aten.all.dim)} | {
    op: (X, Y) for op in (aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor,
                          aten.gt.Tensor, aten.ge.Tensor)} | {
    op: (X, 0) for op in (aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar,
                          aten.ge.Scalar)}
# arguments that have no place
KEYWORDS = {aten.sort.stable: {"stable": True}, aten.div.Tensor_mode: {"rounding_mode": None}}
EXAMPLES[aten.div.Tensor_mode] = (X, Y)
EXAMPLES[ops.power_scale] = (X, "e4m3", 2)
# what they return is arbitrary, random or rounded, or they do not run on a CPU; for attention's
# kernels see test_attention_kernels
KERNELS = {getattr(aten, f"_scaled_dot_product_{kernel}_attention{end}").default
           for kernel in ("flash", "efficient", "cudnn") for end in ("", "_backward")}
UNDEFINED = KERNELS | {ops.cast, aten._fused_rms_norm_backward.default,
             aten.empty.memory_format, aten.rand.default, aten.randn.default, aten.randint.default,
             aten.randint.low, aten.empty_like.default, aten.rand_like.default,
             aten.randn_like.default, aten.new_empty.default, aten.randperm.default,
             aten.bernoulli.p, aten.empty_strided.default, aten.new_empty_strided.default}
HOMOGENEOUS = [line.op for line in coverage() if line.homogeneity]


def op_named(name: str):
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def call_node(op, args):
    """A graph node that calls ``op``, as passes see it."""
    graph = torch.fx.Graph()

    def placeholder(value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(op, torch.utils._pytree.tree_map(placeholder, args),
                               KEYWORDS.get(op, {}))
    node.meta["val"] = op(*args, **KEYWORDS.get(op, {}))
    return node


def scaled(argument, by):
    if isinstance(argument, list):
        return [scaled(item, by) for item in argument]
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument * by if is_float else argument


def flat(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneity_holds_on_numbers(name):
    op = op_named(name)
    if op in UNDEFINED:
        return
    args = EXAMPLES.get(op, (X,))
    law = rule_for(op).law(call_node(op, args))
    powers = {index: 2.0 ** (index + 1) for index in law.scaled if index < len(args)}
    changed = [scaled(arg, powers.get(index, 1.0)) for index, arg in enumerate(args)]

    def factor(output):
        result = 1.0
        for index, degree in law.of_output(output).items():
            result *= powers.get(index, 1.0) ** degree
        return result

    follower = factor(0) if law.scaled or not law.follows else 4.0
    for index in law.follows:
        if index < len(args):
            changed[index] = scaled(args[index], follower)
    tolerance = 1e-12 if law.exact else 5e-3
    results = (flat(op(*given, **KEYWORDS.get(op, {}))) for given in (changed, args))
    for output, (got, want) in enumerate(zip(*results, strict=True)):
        if not isinstance(want, torch.Tensor):
            assert got == want
            continue
        by = (factor(output) if law.scaled else follower) if want.is_floating_point() else 1
        torch.testing.assert_close(got, want * by if by != 1 else want, rtol=tolerance,
                                   atol=tolerance)


CONDITIONAL = [
    (aten.add.Scalar, (X, 1.0)),
    (aten.pow.Tensor_Scalar, (X.abs(), 0.5)),
    (aten.clamp.default, (X, 0, 6.0)),
    (aten.clamp_min.default, (X, 1e-6)),
    (aten.masked_fill.Scalar, (X, X > 0, -1e4)),
    (aten.constant_pad_nd.default, (X, [1, 1], 2.0)),
    (aten.scatter.value, (X, 0, torch.zeros(1, 3, 4, dtype=torch.int64), 1.0)),
    (aten.gt.Scalar, (X, 0.5)),
    (aten.threshold_backward.default, (X, Y, 0.1)),
    (aten.linalg_vector_norm.default, (X, 0, [1])),
    (aten.scatter_reduce.two, (X, 0, torch.zeros(2, 3, 4, dtype=torch.int64), Y, "prod")),
    (aten._cdist_forward.default, (X, Y, 0.0, None)),
    (aten._cdist_forward.default, (X, Y, 3.0, None)),
]


@pytest.mark.parametrize(("op", "args"), CONDITIONAL, ids=[str(c[0]) for c in CONDITIONAL])
def test_constants_that_have_a_scale_refuse_one(op, args):
    assert rule_for(op).law(call_node(op, args)) is None


def test_a_quotient_that_is_rounded_has_no_scale():
    node = call_node(aten.div.Tensor_mode, (X, Y))
    node.kwargs = {"rounding_mode": "floor"}
    assert rule_for(aten.div.Tensor_mode).law(node) is None


def test_a_product_of_a_number_of_factors_that_is_a_symbol_has_no_law():
    node = call_node(aten.prod.dim_int, (X, 1))
    assert rule_for(aten.prod.dim_int).law(node).degrees == {0: 3}
    mode = symbolic_fake_mode()
    size = fake_size(mode, "n", 3)
    with mode:
        node.args[0].meta["val"] = torch.empty(2, size, 4)
    assert rule_for(aten.prod.dim_int).law(node) is None


def test_a_cast_passes_scales_between_float_types_only():
    rule = rule_for(aten._to_copy.default)
    node = call_node(aten.alias.default, (X,))
    for dtype, passes in ((torch.bfloat16, True), (torch.float16, True), (torch.int32, False)):
        node.meta["val"] = X.to(dtype)
        assert (rule.law(node) is not None) == passes


class OneOp(nn.Module):
    def __init__(self, op, rest):
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, x):
        return self.op(x, *self.rest)


MOVES = [
    (aten.permute.default, ([2, 0, 1],), (2, 0, 1)),
    (aten.transpose.int, (0, -1), (2, 1, 0)),
    (aten.unsqueeze.default, (1,), (0, None, 1, 2)),
    (aten.unsqueeze.default, (-1,), (0, 1, 2, None)),
    (aten.view.default, ([6, 4],), (None, 2)),
    (aten.view.default, ([2, 3, 2, 2],), (0, 1, None, None)),
    (aten.expand.default, ([5, 2, 3, 4],), (None, 0, 1, 2)),
    (aten.relu.default, (), (0, 1, 2)),
    (aten.linear.default, (torch.ones(5, 4),), (0, 1, None)),
]


@pytest.mark.parametrize(("op", "rest", "want"), MOVES, ids=[f"{m[0]}{m[2]}" for m in MOVES])
def test_axis_maps(op, rest, want):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(2, 3, 4)
    node = graph.call_function(op, (x, *rest))
    node.meta["val"] = op(x.meta["val"], *rest)
    assert rule_for(op).axes(node) == want


@pytest.mark.parametrize("line", [line for line in coverage() if line.family == "movement"],
                         ids=lambda line: line.op)  # fmt: skip
def test_what_moves_keeps_every_element(line):
    rule = rule_for(op_named(line.op))
    if not rule.moves:
        return
    args = EXAMPLES.get(rule.op, (X,))
    assert set(rule.op(*args).flatten().tolist()) == set(args[0].flatten().tolist())


def test_match_axes_from_both_ends():
    assert match_axes((2, 3, 4), (2, 3, 4)) == (0, 1, 2)
    assert match_axes((2, 3, 4), (24,)) == (None,)
    assert match_axes((2, 12), (2, 3, 4)) == (0, None, None)
    assert match_axes((5, 2, 12), (10, 12)) == (None, 2)


def test_contractions_name_their_operands():
    linear = rule_for(aten.linear.default).contraction
    assert [(o.argument, o.role, o.axes) for o in linear.operands] == [
        (0, "activation", (-1,)), (1, "weight", (-1,)), (2, "bias", ())]  # fmt: skip
    conv = rule_for(aten.conv2d.default).contraction
    assert conv.operand("weight").axes == (-3, -2, -1)
    assert rule_for(aten.relu.default).contraction is None


def test_duplicate_registration_is_refused():
    with pytest.raises(ConfigError, match=r"aten\.relu\.default already has a rule"):
        register(Rule(op=aten.relu.default, family="elementwise"))


def test_missing_rules_are_visible():
    assert rule_for(aten.erfinv.default) is None
    lines = coverage([aten.erfinv.default, aten.erfinv.default, aten.relu.default])
    by_op = {line.op: line for line in lines}
    gap = by_op["aten.erfinv.default"]
    assert gap.family is None and gap.count == 2 and not gap.homogeneity
    assert by_op["aten.relu.default"].count == 1


def test_contraction_of_ignores_other_nodes():
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    kinds = [c.kind for n in program.module.graph.nodes if (c := contraction_of(n))]
    assert kinds == ["linear"]
