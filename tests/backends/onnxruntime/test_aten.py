"""Each ATen lowering against eager torch: static, dynamic, and on a size that was never seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scaleprop.backends.onnxruntime import OnnxRuntimeBackend
from scaleprop.passes.base import relative_error
from tests.backends.onnxruntime.single_op import LARGE, SMALL, Case, program_of, tensor_leaves

aten = torch.ops.aten
CASES: dict[str, Case] = {}
# fake tensors of unknown size do not go through these operators; export decomposes them
STATIC_ONLY = {"addcmul", "addcdiv", "pad_negative", "bilinear"}


def f(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def i(*shape: int, low: int = -9, high: int = 10, seed: int = 0,
      dtype: torch.dtype = torch.int64) -> torch.Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def b(*shape: int, seed: int = 0) -> torch.Tensor:
    return f(*shape, seed=seed) > 0


def case(name: str, op: Any, make: Any, **kwargs: Any) -> None:
    assert name not in CASES
    CASES[name] = lambda n: (op, make(n), kwargs)


# ---- arithmetic ------------------------------------------------------------------------------
for _name in ("abs", "neg", "sign", "exp", "sin", "cos", "tan", "tanh", "atan", "sinh", "cosh",
              "erf", "sigmoid", "floor", "ceil", "round", "trunc", "expm1", "exp2", "square",
              "relu", "silu", "hardsigmoid", "hardswish", "mish", "log_sigmoid", "isnan", "isinf",
              "softplus", "hardtanh", "leaky_relu", "elu", "celu", "gelu"):  # fmt: skip
    case(_name, getattr(aten, _name).default, lambda n: (3 * f(n, 4),))
for _name in ("log", "sqrt", "rsqrt", "reciprocal", "log2", "log10", "log1p"):
    case(_name, getattr(aten, _name).default, lambda n: (f(n, 4).abs() + 0.1,))
for _name in ("abs", "neg", "sign"):
    for _dtype in (torch.int64, torch.int32, torch.int8):
        case(f"{_name}_{_dtype}", getattr(aten, _name).default,
             lambda n, d=_dtype: (i(n, 3, dtype=d),))
case("asin", aten.asin.default, lambda n: (f(n, 4).tanh(),))
case("acos", aten.acos.default, lambda n: (f(n, 4).tanh(),))
case("log1p_small", aten.log1p.default, lambda n: (1e-6 * f(n, 4).abs(),))
case("log1p_inf", aten.log1p.default, lambda n: (torch.tensor([math.inf, 0.0, 1.0]),))
case("expm1_small", aten.expm1.default, lambda n: (1e-6 * f(n, 4),))
case("exp_int", aten.exp.default, lambda n: (i(n, 3, low=-3, high=3),))
case("gelu_tanh", aten.gelu.default, lambda n: (f(n, 4),), approximate="tanh")
case("elu_scaled", aten.elu.default, lambda n: (f(n, 4), 1.5, 1.1, 0.7))
case("softplus_beta", aten.softplus.default, lambda n: (20 * f(n, 4), 2.0, 5.0))
case("isinf_inf", aten.isinf.default, lambda n: (torch.tensor([math.inf, -math.inf, math.nan]),))
case("isnan_nan", aten.isnan.default, lambda n: (torch.tensor([math.inf, 1.0, math.nan]),))

for _name in ("add", "sub", "mul", "div"):
    _op = getattr(aten, _name).Tensor
    case(f"{_name}_broadcast", _op, lambda n: (f(n, 1, 4), f(3, 1, seed=1)))
    case(f"{_name}_int_float", _op, lambda n: (i(n, 4, low=1), f(4)))
    case(f"{_name}_scalar", _op, lambda n: (f(n, 4), 2.5))
    case(f"{_name}_int_by_float_scalar", _op, lambda n: (i(n, 4), 2.5))
case("add_int8_uint8", aten.add.Tensor,
     lambda n: (i(n, dtype=torch.int8), i(n, low=0, dtype=torch.uint8)))
case("add_alpha", aten.add.Tensor, lambda n: (f(n, 4), f(4, seed=1)), alpha=0.5)
case("sub_alpha", aten.sub.Tensor, lambda n: (f(n, 4), f(4, seed=1)), alpha=2)
case("rsub", aten.rsub.Scalar, lambda n: (f(n, 4), 1.5))
case("add_bool", aten.add.Tensor, lambda n: (b(n, 4), b(n, 4, seed=1)))
case("mul_bool", aten.mul.Tensor, lambda n: (b(n, 4), b(n, 4, seed=1)))
case("mul_bool_float", aten.mul.Tensor, lambda n: (b(n, 4), f(n, 4)))
case("mul_zero_dim_double", aten.mul.Tensor, lambda n: (f(n, 4), f(dtype=torch.float64)))
case("mul_double", aten.mul.Tensor, lambda n: (f(n, 4), f(n, 4, dtype=torch.float64)))
case("div_int", aten.div.Tensor, lambda n: (i(n, 4), i(4, low=1)))
for _mode in ("floor", "trunc"):
    case(f"div_{_mode}_int", aten.div.Tensor_mode, lambda n: (i(n, 4), i(4, low=1, seed=3)),
         rounding_mode=_mode)
    case(f"div_{_mode}_float", aten.div.Tensor_mode, lambda n: (9 * f(n, 4), f(4, seed=3)),
         rounding_mode=_mode)
case("floor_divide", aten.floor_divide.default, lambda n: (i(n, 4), i(4, low=-4, high=-1)))
case("fmod", aten.fmod.Scalar, lambda n: (9 * f(n, 4), 2.5))
case("fmod_int", aten.fmod.Scalar, lambda n: (i(n, 4), 3))
case("remainder", aten.remainder.Scalar, lambda n: (9 * f(n, 4), 2.5))
case("remainder_negative", aten.remainder.Scalar, lambda n: (9 * f(n, 4), -2.5))
case("remainder_int", aten.remainder.Scalar, lambda n: (i(n, 4), 3))
case("remainder_tensor", aten.remainder.Tensor, lambda n: (i(n, 4), i(4, low=-4, high=-1)))
for _e in (0.5, -0.5, 1, 2, 3, -1.5):
    case(f"pow_{_e}", aten.pow.Tensor_Scalar, lambda n, e=_e: (f(n, 4).abs() + 0.1, e))
case("pow_int", aten.pow.Tensor_Scalar, lambda n: (i(n, 4), 2))
case("pow_tensor", aten.pow.Tensor_Tensor, lambda n: (f(n, 4).abs(), f(4, seed=2)))
case("pow_scalar_base", aten.pow.Scalar, lambda n: (2.0, f(n, 4)))
case("maximum", aten.maximum.default, lambda n: (f(n, 4), f(4, seed=2)))
case("minimum_int", aten.minimum.default, lambda n: (i(n, 4), i(4, seed=2)))
case("clamp", aten.clamp.default, lambda n: (f(n, 4), -0.5, 0.5))
case("clamp_low", aten.clamp.default, lambda n: (f(n, 4), -0.5))
case("clamp_high", aten.clamp.default, lambda n: (i(n, 4), None, 2))
case("clamp_tensor", aten.clamp.Tensor, lambda n: (f(n, 4), f(4) - 1, f(4)))
case("clamp_min", aten.clamp_min.default, lambda n: (f(n, 4), 0.1))
case("clamp_max", aten.clamp_max.default, lambda n: (f(n, 4), 0.1))
case("addcmul", aten.addcmul.default, lambda n: (f(n, 4), f(4), f(n, 1)), value=0.5)
case("addcdiv", aten.addcdiv.default, lambda n: (f(n, 4), f(4), f(n, 1)), value=0.5)
case("lerp", aten.lerp.Scalar, lambda n: (f(n, 4), f(n, 4, seed=1), 0.3))
for _dtype in (torch.int64, torch.int32, torch.bool, torch.float64, torch.bfloat16, torch.float16,
               torch.uint8):  # fmt: skip
    case(f"to_{_dtype}", aten._to_copy.default, lambda n: (f(n, 4).abs() * 9,), dtype=_dtype)
case("to_same", aten._to_copy.default, lambda n: (f(n, 4),))
case("add_bfloat16", aten.add.Tensor, lambda n: (f(n, 4, dtype=torch.bfloat16), 2.0))

# ---- logic -----------------------------------------------------------------------------------
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    case(f"{_name}_int_float", getattr(aten, _name).Tensor, lambda n: (i(n, 4), f(4)))
    case(f"{_name}_scalar", getattr(aten, _name).Scalar, lambda n: (i(n, 4), 0.5))
    case(f"{_name}_bool", getattr(aten, _name).Tensor, lambda n: (b(n, 4), b(4, seed=1)))
    case(f"{_name}_int8", getattr(aten, _name).Scalar, lambda n: (i(n, 4, dtype=torch.int8), 1))
for _name in ("logical_and", "logical_or", "logical_xor"):
    case(_name, getattr(aten, _name).default, lambda n: (i(n, 4, low=0, high=2), b(4)))
case("logical_not", aten.logical_not.default, lambda n: (i(n, 4, low=0, high=2),))
for _name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
    case(f"{_name}_bool", getattr(aten, _name).Tensor, lambda n: (b(n, 4), b(4)))
    case(f"{_name}_int", getattr(aten, _name).Tensor, lambda n: (i(n, 4), i(4)))
case("bitwise_not_bool", aten.bitwise_not.default, lambda n: (b(n, 4),))
case("bitwise_not_int", aten.bitwise_not.default, lambda n: (i(n, 4, dtype=torch.int32),))
case("where", aten.where.self, lambda n: (b(n, 4), f(4), f(n, 1)))
case("where_bool", aten.where.self, lambda n: (b(n, 4), b(4, seed=1), b(n, 1, seed=2)))
case("where_mixed", aten.where.self, lambda n: (b(n, 4), i(4), f(n, 1)))
case("where_int8", aten.where.self,
     lambda n: (b(n, 4), i(4, dtype=torch.int8), i(n, 4, dtype=torch.int8)))
case("masked_fill", aten.masked_fill.Scalar, lambda n: (f(n, 4), b(4), -math.inf))
case("masked_fill_tensor", aten.masked_fill.Tensor, lambda n: (f(n, 4), b(4), f()))

# ---- shapes ----------------------------------------------------------------------------------
case("view_infer", aten.view.default, lambda n: (f(n, 4, 6), [-1, 24]))
case("view_scalar", aten.view.default, lambda n: (f(1, 1), []))
case("view_dtype", aten.view.dtype, lambda n: (f(n, 4), torch.int32))
case("unsqueeze", aten.unsqueeze.default, lambda n: (f(n, 4), -1))
case("squeeze", aten.squeeze.dim, lambda n: (f(n, 1, 4), 1))
case("squeeze_not_one", aten.squeeze.dim, lambda n: (f(n, 3, 4), 1))
case("squeeze_dims", aten.squeeze.dims, lambda n: (f(1, n, 1), [0, -1]))
case("squeeze_all", aten.squeeze.default, lambda n: (f(1, 3, 1),))
case("permute", aten.permute.default, lambda n: (f(n, 3, 4), [2, 0, -2]))
case("permute_identity", aten.permute.default, lambda n: (f(n, 3, 4), [0, 1, 2]))
case("transpose", aten.transpose.int, lambda n: (f(n, 3, 4), -1, 0))
case("t", aten.t.default, lambda n: (f(n, 3),))
case("t_vector", aten.t.default, lambda n: (f(n),))
case("expand", aten.expand.default, lambda n: (f(n, 1, 4), [-1, 3, 4]))
case("expand_bool", aten.expand.default, lambda n: (b(n, 1), [-1, 3]))
case("expand_int16", aten.expand.default, lambda n: (i(n, 1, dtype=torch.int16), [-1, 3]))
case("clone", aten.clone.default, lambda n: (f(n, 4),))
case("repeat", aten.repeat.default, lambda n: (f(n, 4), [2, 1, 3]))
case("slice", aten.slice.Tensor, lambda n: (f(n, 8), 1, 2, 7, 2))
case("slice_negative", aten.slice.Tensor, lambda n: (f(n, 8), 0, -3, 2**63 - 1))
case("slice_whole", aten.slice.Tensor, lambda n: (f(n, 8), 0, 0, 2**63 - 1))
case("slice_beyond", aten.slice.Tensor, lambda n: (f(n, 8), 1, 3, 100))
case("select", aten.select.int, lambda n: (f(n, 4), 1, -1))
case("cat", aten.cat.default, lambda n: ([f(n, 4), f(2, 4)],))
case("cat_mixed", aten.cat.default, lambda n: ([f(n, 4), i(n, 2)], -1))
case("cat_empty", aten.cat.default, lambda n: ([torch.empty(0), f(n, 2)], -1))
case("stack", aten.stack.default, lambda n: ([f(n, 4), f(n, 4, seed=1)], -1))
case("split", aten.split.Tensor, lambda n: (f(n, 7), 3, 1))
case("split_one", aten.split.Tensor, lambda n: (f(n, 7), 7, 1))
case("split_with_sizes", aten.split_with_sizes.default, lambda n: (f(n, 7), [1, 4, 2], -1))
case("unbind", aten.unbind.int, lambda n: (f(n, 3), 1))
case("flip", aten.flip.default, lambda n: (f(n, 3), [0, 1]))
case("roll", aten.roll.default, lambda n: (f(n, 6), [2, -1], [0, 1]))
case("roll_flat", aten.roll.default, lambda n: (f(n, 6), [2]))
case("pad", aten.constant_pad_nd.default, lambda n: (f(n, 6), [1, 2, 0, 3], 0.5))
case("pad_negative", aten.constant_pad_nd.default, lambda n: (f(n, 6), [-1, 2]))
case("pad_bool", aten.constant_pad_nd.default, lambda n: (b(n, 6), [1, 2], True))
case("tril", aten.tril.default, lambda n: (f(2, n, n), -1))
case("triu_bool", aten.triu.default, lambda n: (b(n, n), 1))
case("pixel_shuffle", aten.pixel_shuffle.default, lambda n: (f(n, 8, 3, 4), 2))
case("pixel_unshuffle", aten.pixel_unshuffle.default, lambda n: (f(n, 2, 4, 6), 2))
case("unfold", aten.unfold.default, lambda n: (f(n, 9), 1, 4, 2))

# ---- indexing --------------------------------------------------------------------------------
case("embedding", aten.embedding.default, lambda n: (f(9, 4), i(n, 3, low=0, high=9)))
case("embedding_int32", aten.embedding.default,
     lambda n: (f(9, 4), i(n, 3, low=0, high=9, dtype=torch.int32)))
case("index_select", aten.index_select.default, lambda n: (f(n, 4), 1, i(6, low=0, high=4)))
case("gather", aten.gather.default, lambda n: (f(n, 4), 1, i(n, 2, low=0, high=4)))
case("index_one", aten.index.Tensor, lambda n: (f(n, 4), [i(3, 2, low=-4, high=4)]))
case("index_second", aten.index.Tensor, lambda n: (f(n, 4), [None, i(3, low=-4, high=4)]))
case("index_two", aten.index.Tensor,
     lambda n: (f(n, 4, 3), [i(n, 1, low=0, high=5), i(2, low=0, high=4)]))
case("index_neighbours", aten.index.Tensor,
     lambda n: (f(n, 4, 3), [None, i(6, low=0, high=4), i(6, low=0, high=3)]))
case("index_apart", aten.index.Tensor,
     lambda n: (f(4, n, 3), [i(6, low=0, high=4), None, i(6, low=0, high=3)]))
case("index_put", aten.index_put.default,
     lambda n: (f(n, 4), [torch.tensor([2, 0])], f(2, 4, seed=1)))
case("index_put_add", aten.index_put.default,
     lambda n: (f(n, 4), [torch.tensor([2, 2])], f(2, 4, seed=1), True))
case("index_put_two", aten.index_put.default,
     lambda n: (f(n, 4), [torch.tensor([2, 1]), torch.tensor([0, 3])], f()))
case("index_put_mask", aten.index_put.default, lambda n: (f(n, 4), [b(n, 4)], f()))
case("index_put_mask_rows", aten.index_put.default, lambda n: (f(n, 4), [b(n)], f()))
case("scatter", aten.scatter.src,
     lambda n: (f(n, 4), 1, i(n, 1, low=0, high=4), f(n, 1, seed=2)))
case("scatter_value", aten.scatter.value, lambda n: (f(n, 4), 1, i(n, 1, low=0, high=4), 2.5))
case("scatter_add", aten.scatter_add.default,
     lambda n: (f(n, 4), 1, i(n, 2, low=0, high=4), f(n, 2, seed=2)))
case("slice_scatter", aten.slice_scatter.default, lambda n: (f(n, 6), f(n, 2, seed=1), 1, 1, 5, 2))
case("topk", aten.topk.default, lambda n: (f(n, 6), 3))
case("topk_smallest", aten.topk.default, lambda n: (f(n, 6), 2, 0, False))
case("sort", aten.sort.default, lambda n: (f(n, 6), 0))
case("sort_descending", aten.sort.default, lambda n: (f(n, 6), -1, True))
case("sort_int_ties", aten.sort.stable, lambda n: (i(n, 6, low=0, high=3),), stable=True, dim=0)
case("histc", aten.histc.default, lambda n: (i(n, 4, low=-2, high=9).float(), 8, 0, 7))
case("histc_fine", aten.histc.default, lambda n: (f(n, 40), 16, -1.5, 2.0))
case("one_hot", aten.one_hot.default, lambda n: (i(n, 3, low=0, high=6), 6))

# ---- reductions ------------------------------------------------------------------------------
for _name, _op in {"sum": aten.sum.dim_IntList, "mean": aten.mean.dim, "amax": aten.amax.default,
                   "amin": aten.amin.default, "logsumexp": aten.logsumexp.default}.items():
    case(f"{_name}_last", _op, lambda n: (f(n, 3, 4), [-1]))
    case(f"{_name}_two", _op, lambda n: (f(n, 3, 4), [0, 2], True))
case("sum_all", aten.sum.default, lambda n: (f(n, 3),))
case("sum_bool", aten.sum.dim_IntList, lambda n: (b(n, 3), [0]))
case("sum_int_to_float", aten.sum.dim_IntList, lambda n: (i(n, 3), [0]), dtype=torch.float32)
case("mean_all", aten.mean.default, lambda n: (f(n, 3),))
case("prod", aten.prod.dim_int, lambda n: (f(n, 3), 1))
for _name in ("any", "all"):
    case(f"{_name}_dim", getattr(aten, _name).dim, lambda n: (b(n, 3), 1))
    case(f"{_name}_all", getattr(aten, _name).default, lambda n: (b(n, 3),))
    case(f"{_name}_float", getattr(aten, _name).dim, lambda n: (f(n, 3).relu() * 0.1, 1, True))
case("max_all", aten.max.default, lambda n: (i(n, 3),))
case("min_all", aten.min.default, lambda n: (f(n, 3),))
case("max_dim", aten.max.dim, lambda n: (f(n, 3), 1))
case("min_dim", aten.min.dim, lambda n: (f(n, 3), 0, True))
case("argmax", aten.argmax.default, lambda n: (f(n, 6), -1))
case("argmax_int64_ties", aten.argmax.default, lambda n: (i(n, 6, low=0, high=2), -1))
case("argmin_all", aten.argmin.default, lambda n: (f(n, 6),))
case("var", aten.var.correction, lambda n: (f(n, 6), [1]), correction=1)
case("var_all", aten.var.correction, lambda n: (f(n, 6),))
case("std", aten.std.correction, lambda n: (f(n, 6), [0]), correction=0, keepdim=True)
for _order in (1, 2, 3, math.inf, -math.inf):
    case(f"norm_{_order}", aten.linalg_vector_norm.default,
         lambda n, o=_order: (f(n, 6), o, [-1], True))
case("cumsum", aten.cumsum.default, lambda n: (f(n, 6), 0))
case("cumsum_bool", aten.cumsum.default, lambda n: (b(n, 6), -1))
case("cumsum_int8", aten.cumsum.default, lambda n: (i(n, 6, dtype=torch.int8), -1),
     dtype=torch.int32)

# ---- creation --------------------------------------------------------------------------------
for _dtype in (torch.float32, torch.int64, torch.bool):
    case(f"full_like_{_dtype}", aten.full_like.default, lambda n: (f(n, 3), 1), dtype=_dtype)
case("zeros_like", aten.zeros_like.default, lambda n: (f(n, 3),))
case("ones_like", aten.ones_like.default, lambda n: (i(n, 3),))
case("copy", aten.copy.default, lambda n: (f(n, 3), i(3)))

# ---- matrices --------------------------------------------------------------------------------
case("linear", aten.linear.default, lambda n: (f(n, 3, 8), f(6, 8), f(6)))
case("linear_no_bias", aten.linear.default, lambda n: (f(n, 8), f(6, 8)))
case("linear_vector", aten.linear.default, lambda n: (f(8), f(6, 8), f(6)))
case("mm", aten.mm.default, lambda n: (f(n, 8), f(8, 3)))
case("mm_int", aten.mm.default, lambda n: (i(n, 8), i(8, 3)))
case("bmm", aten.bmm.default, lambda n: (f(n, 3, 8), f(n, 8, 3)))
case("matmul_broadcast", aten.matmul.default, lambda n: (f(2, 1, n, 8), f(3, 8, 4)))
case("matmul_vector", aten.matmul.default, lambda n: (f(n, 8), f(8)))
case("addmm", aten.addmm.default, lambda n: (f(3), f(n, 8), f(8, 3)), beta=0.5, alpha=2)
case("baddbmm", aten.baddbmm.default, lambda n: (f(n, 2, 3), f(n, 2, 8), f(n, 8, 3)))
case("bilinear", aten.bilinear.default, lambda n: (f(n, 3), f(n, 4), f(5 + 1, 3, 4), f(6)))
case("conv1d", aten.conv1d.default, lambda n: (f(n, 4, 9), f(6, 2, 3), f(6), [2], [1], [1], 2))
case("conv2d", aten.conv2d.default, lambda n: (f(n, 3, 9, 8), f(6, 3, 3, 2), f(6), [2, 1], [1]))
case("conv2d_same", aten.conv2d.padding, 
     lambda n: (f(n, 3, 9, 8), f(6, 3, 2, 3), None, [1], "same"))
case("conv3d", aten.conv3d.default, lambda n: (f(n, 2, 4, 4, 4), f(3, 2, 2, 2, 2)))
case("conv_transposed", aten.convolution.default,
     lambda n: (f(n, 4, 6, 6), f(4, 3, 3, 3), f(3), [2, 2], [1, 1], [1, 1], True, [1, 1], 1))

# ---- norms, softmax, pooling -----------------------------------------------------------------
case("layer_norm", aten.layer_norm.default, lambda n: (f(n, 3, 8), [8], f(8), f(8)))
case("layer_norm_bare", aten.layer_norm.default, lambda n: (f(n, 3, 8), [3, 8]))
case("layer_norm_eps", aten.layer_norm.default,
     lambda n: (1e-3 * f(n, 8), [8], f(8), None, 1e-12))
case("rms_norm", aten.rms_norm.default, lambda n: (f(n, 3, 8), [8], f(8), 1e-6))
case("rms_norm_bare", aten.rms_norm.default, lambda n: (f(n, 3, 8), [8]))
case("group_norm", aten.group_norm.default, lambda n: (f(n, 6, 4, 4), 3, f(6), f(6)))
case("instance_norm", aten.instance_norm.default,
     lambda n: (f(n, 4, 6), f(4), None, None, None, True, 0.1, 1e-5, False))
case("batch_norm", aten.batch_norm.default,
     lambda n: (f(n, 4, 3), f(4), f(4), f(4), f(4).abs(), False, 0.1, 1e-5, False))
for _dim in (-1, 0):
    case(f"softmax_{_dim}", aten.softmax.int, lambda n, d=_dim: (3 * f(n, 6), d))
    case(f"log_softmax_{_dim}", aten.log_softmax.int, lambda n, d=_dim: (3 * f(n, 6), d))
case("softmax_to_double", aten.softmax.int, lambda n: (f(n, 6), -1, torch.float64))
case("safe_softmax", aten._safe_softmax.default,
     lambda n: (torch.where(f(n, 6) > f(n, 1), -math.inf, f(n, 6, seed=1)), -1))
case("prelu", aten._prelu_kernel.default, lambda n: (f(n, 4), f(1, 4)))
case("glu", aten.glu.default, lambda n: (f(n, 6),))
case("max_pool1d", aten.max_pool1d.default, lambda n: (f(n, 2, 9), [3], [2], [1]))
case("max_pool2d", aten.max_pool2d.default, lambda n: (f(n, 2, 9, 8), [3, 2], [2], [1, 0]))
case("max_pool2d_ceil", aten.max_pool2d.default,
     lambda n: (f(n, 2, 9, 8), [2, 2], [], [0, 0], [1, 1], True))
case("avg_pool2d", aten.avg_pool2d.default,
     lambda n: (f(n, 2, 8, 8), [3, 3], [2, 2], [1, 1], False, False))
case("adaptive_one", aten.adaptive_avg_pool2d.default, lambda n: (f(n, 2, 8, 9), [1, 1]))
case("adaptive", aten.adaptive_avg_pool2d.default, lambda n: (f(n, 2, 8, 9), [3, 5]))
case("adaptive_1d", aten.adaptive_avg_pool1d.default, lambda n: (f(n, 2, 9), [4]))
case("upsample_nearest", aten.upsample_nearest2d.default, lambda n: (f(n, 2, 4, 4), [8, 6]))
case("upsample_bilinear", aten.upsample_bilinear2d.default,
     lambda n: (f(n, 2, 4, 4), [8, 7], False))
case("upsample_corners", aten.upsample_bilinear2d.default, lambda n: (f(n, 2, 4, 4), [8, 7], True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_operator_equals_eager(name: str, dynamic: bool) -> None:
    if dynamic and name in STATIC_ONLY:
        pytest.skip("decomposed by export")
    program, inputs = program_of(CASES[name], dynamic)
    executable = OnnxRuntimeBackend().lower(program)
    sizes = [SMALL, LARGE] if dynamic else [SMALL]
    for size in sizes:
        op, args, kwargs = CASES[name](size)
        tensors = tensor_leaves((args, kwargs))
        assert len(tensors) == len(inputs)
        expected = op(*args, **kwargs)
        expected = list(expected) if isinstance(expected, (list, tuple)) else [expected]
        actual = executable(tensors)
        assert len(actual) == len(expected)
        for got, want in zip(actual, expected, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            bound = 1e-2 if want.dtype in (torch.bfloat16, torch.float16) else 2e-6
            assert relative_error(got, want) <= (bound if want.is_floating_point() else 0)
