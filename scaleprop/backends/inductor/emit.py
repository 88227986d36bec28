"""The ATen and oneDNN calls of one planned linear, written so that tracing records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg

from scaleprop import ops
from scaleprop.backends.inductor.linears import Linear, Operand
from scaleprop.ops import implementations

Parts = Mapping[str, Tensor]


@dataclasses.dataclass
class Inputs:
    """Values computed so far, and casts shared by the linears that read the same value.

    sums: what linears added to a residual, as their kernels return it: [rows, columns].
    """

    values: Mapping[torch.fx.Node, Any]
    sums: dict[torch.fx.Node, Tensor] = dataclasses.field(
        default_factory=dict[torch.fx.Node, Tensor])
    fake_quantized: dict[torch.fx.Node, Tensor] = dataclasses.field(
        default_factory=dict[torch.fx.Node, Tensor])

    def plain(self, operand: Operand) -> Tensor:
        """x̂ of an operand: fake-quantized in one go, never through codes."""
        if operand.x.target is not ops.quantize:
            return self.values[operand.x]
        if operand.x not in self.fake_quantized:
            arguments: Any = (operand.x.args, operand.x.kwargs)
            args, kwargs = map_arg(arguments, lambda node: self.values[node])
            self.fake_quantized[operand.x] = implementations.fake_quantize(*args, **kwargs)
        return self.fake_quantized[operand.x]


def emit(linear: Linear, inputs: Inputs, constants: Parts, dtype: torch.dtype) -> Tensor:
    """[..., all columns of all members]; quantized codes where the epilogue quantizes.

    dtype: float32, or bfloat16 where every reader takes that.
    """
    if linear.kind == "float":
        y = torch.ops.mkldnn._linear_pointwise(
            inputs.plain(linear.operand).to(linear.constants["weight"].dtype),
            constants["weight"], constants.get("bias"), "none", [], "")
        return y.to(dtype)
    x = inputs.values[linear.operand.x]
    row = linear.operand.x_format is not None and linear.operand.x_format.granularity.kind == "row"
    if linear.kind == "fp8" or row:
        return _scaled_afterwards(linear, x, constants).to(dtype)
    return _per_tensor(linear, x, inputs, constants, dtype)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _per_tensor(linear: Linear, x: list[Tensor], inputs: Inputs, constants: Parts,
                dtype: torch.dtype) -> Tensor:
    """INT8 with one scale for x: the kernel applies it, the bias and the epilogue."""
    after = linear.epilogue
    out = after.dtype if after.quantize is not None else dtype
    weight = (constants["weight"], constants["scale"], constants["zero_point"])
    bias = constants.get("bias")
    given: tuple[Any, Any] | None = linear.given
    if given is None:
        zero = x[2].to(torch.int32) if len(x) > 2 else x[1].new_zeros((), dtype=torch.int32)
        given = (x[1], zero)
    kernel = torch.ops.onednn.qlinear_pointwise
    if after.add is None or after.other is None:
        call: Any = kernel.default if linear.given is not None else kernel.tensor
        y = call(_flat(x[0]), *given, *weight, bias, after.scale, after.zero_point, out,
                 after.post_op, [], after.algorithm)
    else:
        other = inputs.values[after.other]
        in_place = after.in_place and other.dtype == out
        # Inductor adds in place to a buffer, never to a view of one: no reshaping here.
        other = inputs.sums.get(after.other, other if in_place else _flat(other))
        codes = _flat(x[0]) if other.ndim == 2 else x[0]
        call = kernel.binary if linear.given is not None else kernel.binary_tensor
        y = call(codes, *given, *weight, other, bias, 1.0, 0, out, 1.0, 0,
                 "sum" if in_place else "add", 1.0, "none", [], "")
        inputs.sums[after.add] = y
    return y.reshape(*x[0].shape[:-1], y.shape[-1])


def _scaled_afterwards(linear: Linear, x: list[Tensor], constants: Parts) -> Tensor:
    """Scales of x multiply the kernel's result, then the bias: fused with what follows."""
    y = torch.ops.onednn.qlinear_pointwise.default(
        _flat(x[0]), 1.0, 0, constants["weight"], constants["scale"], constants["zero_point"],
        None, 1.0, 0, torch.float32, "none", [], "")
    y = y.reshape(*x[0].shape[:-1], y.shape[-1])
    if "column_sum" in constants:
        y = y - x[2].to(torch.float32) * constants["column_sum"]
    y = y * x[1]
    bias = constants.get("bias")
    return y if bias is None else y + bias
