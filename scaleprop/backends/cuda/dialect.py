"""What becomes of each ``scaleprop::*`` on a device: a kernel, or torch operators.

- ``scaled_mm`` of operands that the device multiplies as they are: the library's product.
- Of other stored weights: a product kernel, of blocks in the device's own units where it has some
  for them, else of operands decoded in registers.
- Of formats that no kernel reads (codebooks, three bits, …): x̂ times ŵ, dequantized once when
  compiled, in a library product of float32.
- ``quantize`` in blocks, tiles, rows and tensors: one kernel, which computes what is before it,
  too, where ``fusions`` says so. In other granularities or rules: torch operators, which Inductor
  fuses with what is around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop import ops
from scaleprop.backends.cuda import library, operators, products, words
from scaleprop.backends.cuda.devices import Capability, capability_of
from scaleprop.backends.cuda.fusions import fusions
from scaleprop.backends.inductor.emit import Inputs
from scaleprop.backends.inductor.linears import Constants, Epilogue, Operand, Weight, read
from scaleprop.backends.inductor.trace import Dialect
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.formats.tensor import dequantize_parts
from scaleprop.ops import implementations

kernels: Any = torch.ops.scaleprop_cuda


@dataclasses.dataclass(frozen=True)
class Product:
    """One ``scaled_mm``. kind: ``library``, ``stored``, ``float``, or ``open``: weights computed at
    run time.

    constants: parts of the weight by place, and its column sums; or ŵ. plain: see
    ``words.is_plain``.
    """

    kind: str
    operand: Operand
    constants: Mapping[str, Weight]
    dtype: torch.dtype
    plain: bool = False
    epilogue: Epilogue = dataclasses.field(default_factory=Epilogue)

    @property
    def members(self) -> tuple[tuple[torch.fx.Node, int, int], ...]:
        """The node; all of its columns."""
        return ((self.operand.node, 0, 0),)

    @property
    def description(self) -> str:
        """For the report."""
        x = "x" if self.operand.x_format is None else str(self.operand.x_format)
        where = {"library": "library product", "stored": "Triton product",
                 "float": "float32 product", "open": "torch operators"}[self.kind]
        return f"{where} {x} × {self.operand.w_format}"


def dialect_for(device: torch.device) -> Dialect:
    """Kernels where there are; products in the dtype that readers take."""
    capability = capability_of(device)

    def plan(graph: torch.fx.Graph, constants: Constants) -> list[Product]:
        return [_product(read(node), constants, capability)
                for node in graph.nodes if node.target is ops.scaled_mm]  # fmt: skip

    return Dialect(plan, _emit, {
        ops.quantize: _quantize, ops.dequantize: implementations.dequantize,
        ops.fake_quantize: implementations.fake_quantize, ops.hadamard: implementations.hadamard,
    }, _named, device,
        lambda graph, linears: fusions(graph, stored_inputs(linears)))


def _named(node: torch.fx.Node, linears: Sequence[Product]) -> str:
    if node not in stored_inputs(linears):
        return "fused torch operators"
    value: Any = node.args[0]
    fmt = parse(str(node.args[1]))
    kernel = _has_kernel(value.meta["val"], fmt, node.args[2:], node.kwargs)
    return "Triton quantize" if kernel else "fused torch operators"


def stored_inputs(linears: Sequence[Product]) -> set[torch.fx.Node]:
    """Quantize nodes whose codes a product reads; others are only ever fake-quantized."""
    return {linear.operand.x for linear in linears if linear.kind in ("library", "stored")}


def _product(operand: Operand, constants: Constants, capability: Capability) -> Product:
    fixed = (*operand.weight, *(() if operand.bias is None else (operand.bias,)))
    dtype = _read_as(operand.node)
    if not all(part in constants for part in fixed):
        return Product("open", operand, {}, dtype)
    parts = [constants[part] for part in operand.weight]
    bias = {} if operand.bias is None else {"bias": _constant(constants[operand.bias])}
    w, x = operand.w_format, operand.x_format or operand.x.meta["val"].dtype
    if w is None or not operators.multiplies(x, w, operand.k):
        return Product("float", operand, {"weight": _constant(_dense(operand, parts))} | bias,
                       dtype)  # fmt: skip
    held = {f"part{place}": _constant(part) for place, part in enumerate(parts)}
    kind = library.kind_of(operand.x_format, w, parts[0].shape[0], operand.k, capability)
    if kind is not None:
        return Product("library", operand, held | bias, dtype)
    way = products.way_of(x, w, operand.k)
    if way.x is not None and way.x.zero and way.dot == torch.int8:
        held["sums"] = _constant(products.column_sums(parts, w, operand.k))
    plain = x == torch.bfloat16 and words.takes(w, operand.k) \
        and words.is_plain(parts, w, operand.k)
    return Product("stored", operand, held | bias, dtype, plain)


def _read_as(node: torch.fx.Node) -> torch.dtype:
    """The dtype that every reader converts the result to; else float32."""
    wanted: list[Any] = [
        user.kwargs.get("dtype") if user.target is torch.ops.aten._to_copy.default else None
        for user in node.users]  # fmt: skip
    only = wanted[0] if len(set(wanted)) == 1 else None
    return only if only in (torch.bfloat16, torch.float16) else torch.float32


def _constant(tensor: Tensor) -> Weight:
    return Weight(tensor, tuple(tensor.shape), tensor.dtype)


def _dense(operand: Operand, parts: Sequence[Tensor]) -> Tensor:
    """ŵ in float32."""
    if operand.w_format is None:
        return parts[0].to(torch.float32)
    return dequantize_parts(parts, operand.w_format, (parts[0].shape[0], operand.k))


def _emit(product: Product, inputs: Inputs, constants: Mapping[str, Tensor],
          dtype: torch.dtype) -> Tensor:
    """[..., n] in the dtype that readers take."""
    del dtype  # of unquantized products
    operand, bias = product.operand, constants.get("bias")
    if product.kind == "float":
        x = inputs.plain(operand).to(torch.float32)
        y = torch.nn.functional.linear(x, constants["weight"],
                                       None if bias is None else bias.to(torch.float32))
        return y.to(product.dtype)
    value = inputs.values[operand.x]
    x_format = "f32" if operand.x_format is None else str(operand.x_format)
    parts = [constants[f"part{place}"] for place in range(len(operand.weight))]
    return kernels.multiply([value] if operand.x_format is None else value, parts, bias,
                            constants.get("sums"), x_format, str(operand.w_format), operand.k,
                            product.dtype, product.plain)


def _quantize(x: Tensor, format: str, *args: Any, **kwargs: Any) -> list[Tensor]:
    """One kernel where there is one."""
    if _has_kernel(x, parse(format), args, kwargs):
        return kernels.quantize(x, format, *args, **kwargs)
    return implementations.quantize(x, format, *args, **kwargs)


def _has_kernel(x: Tensor, fmt: ScaledFormat, args: Sequence[Any],
                kwargs: Mapping[str, Any]) -> bool:
    """args, kwargs: those of ``scaleprop::quantize`` behind the format."""
    given = dict(zip(("axis", "rounding", "bits", "scales"), args, strict=False)) | dict(kwargs)
    stochastic = parse_rounding(given.get("rounding", "nearest")).stochastic
    return x.dtype != torch.float64 and operators.quantizes(fmt, x.ndim, stochastic,
                                                            given.get("scales") is not None)
