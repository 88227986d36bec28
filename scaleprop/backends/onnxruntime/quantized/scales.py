"""Scales found when the graph runs: the format rules of ``scaleprop.formats.scales`` as ONNX nodes.

The same operations in the same order in float32, so that scales equal the reference's bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.quantized.emit import FLOAT, INT32, UINT8, Emitter
from scaleprop.backends.onnxruntime.quantized.rounding import fineness, round_scale
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.scaled import FLT_MAX, POWER_RULES, ScaledFormat
from scaleprop.formats.scales import target

KINDS = ("tensor", "row", "channel", "block")
RULES = (*POWER_RULES, "exact")


@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales as values; blocks' are [..., blocks], without the axis that they broadcast along.

    (With it, onnxruntime's operators on a tensor and a scalar take thirty times as long.)

    scale: float32. encode: what data is multiplied by instead of divided by scale (two levels).
    outer: the tensor scale, (). zero_code, zero_point: the zero point in uint8 and in float32.
    largest: the groups' largest magnitudes. fine: ``scale`` is 2^-fine of the format's.
    """

    scale: ir.Value
    encode: ir.Value | None = None
    outer: ir.Value | None = None
    zero_code: ir.Value | None = None
    zero_point: ir.Value | None = None
    largest: ir.Value | None = None
    fine: int = 0


def why_not(fmt: ScaledFormat, given: int) -> str | None:
    """Why scales of this format cannot be found when the graph runs; None where they can.

    given: how many static scales there are.
    """
    if fmt.granularity.kind not in KINDS:
        return "2-D blocks of activations are not supported; use 1-D blocks, such as [1x32]"
    found = given == 0 or (fmt.two_level and given == 1)
    if found and fmt.rule not in RULES:
        return f"scale rule {fmt.rule!r} is not available at run time; use one of {list(RULES)}"
    if given == 0 and fmt.zero_point and fmt.granularity.kind == "channel":
        return "zero points per channel are not found at run time; use [tensor] or [row]"
    if fmt.zero_point and fmt.bits != 8 and fmt.granularity.kind == "block":
        return "zero points of activation blocks are not supported; use a symmetric format"
    return None


def amax(e: Emitter, x: ir.Value, axes: Sequence[int] | None, keep: bool) -> ir.Value:
    """max |x|, from the largest and the smallest value: no |x| is written."""
    high = e.reduce("ReduceMax", x, axes, keep)
    return e("Max", high, e("Neg", e.reduce("ReduceMin", x, axes, keep)))


def block_amax(e: Emitter, x: ir.Value) -> ir.Value:
    """max |x| along the last axis; NaN where there is one.

    Bits of |x| are in the order of |x|, NaN above all: onnxruntime's maximum of floats may lose it.
    """
    bits = e("BitCast", e("Abs", x), to=INT32)
    return e("BitCast", e.reduce("ReduceMax", bits, [-1]), to=FLOAT)


def grouped_axes(fmt: ScaledFormat, rank: int) -> tuple[Sequence[int] | None, bool]:
    """(axes to reduce, whether to keep them) for the grouped view of a rank ``rank`` tensor."""
    match fmt.granularity.kind:
        case "tensor":
            return None, False
        case "row":
            return [-1], True
        case "channel":
            return list(range(rank - 1)), False
        case _:
            return [-1], False


def find(e: Emitter, grouped: ir.Value, fmt: ScaledFormat, rank: int,
         outer: torch.Tensor | None = None) -> Scales:
    """Dynamic scales of ``grouped`` ([..., nb, b] for blocks, else the tensor as it is).

    outer: the scale of the whole tensor, where it is given and those of blocks are not.
    """
    axes, keep = grouped_axes(fmt, rank)
    if fmt.zero_point:
        return _find_affine(e, grouped, fmt, axes, keep)
    blocks = fmt.granularity.kind == "block"
    largest = block_amax(e, grouped) if blocks else amax(e, grouped, axes, keep)
    if fmt.two_level:
        return _find_two_level(e, largest, fmt, outer)
    fine = fineness(fmt.element) if blocks and keeps_infinity(fmt) else 0
    return Scales(one_level(e, largest, fmt, fine), largest=largest, fine=fine)


def keeps_infinity(fmt: ScaledFormat) -> bool:
    """Whether the scale of a block that holds NaN or Inf is Inf; otherwise it is NaN."""
    return fmt.rule == "floor" and not fmt.scale.has_zero and not fmt.two_level


def one_level(e: Emitter, largest: ir.Value, fmt: ScaledFormat, fine: int = 0) -> ir.Value:
    """The scale of groups whose largest magnitude is ``largest``; see ``keeps_infinity``."""
    if keeps_infinity(fmt):  # its values become NaN
        scale = e("Mul", e.power_below(largest), 2.0 ** -(fmt.element.emax + fine))
        return e("Max", scale, 2.0 ** -(127 + fine))
    if fmt.rule in POWER_RULES or not fmt.scale.has_zero:
        scale = _power_scale(e, largest, fmt)
        empty = largest
    else:
        scale = empty = _round_scale(e, e("Div", largest, float(fmt.element.max)), fmt)
    if fmt.scale.has_zero:
        scale = e("Where", e("Equal", empty, 0.0), 1.0, scale)
    return e("Add", scale, e("Sub", largest, largest))  # Inf - Inf is NaN


def _power_scale(e: Emitter, largest: ir.Value, fmt: ScaledFormat) -> ir.Value:
    item = fmt.element
    smallest = max(fmt.scale.smallest, 2.0**-127)
    bound = _power_bound(fmt)
    scale = e("Mul", e.power_below(largest), 2.0**-item.emax)
    scale = e("Clip", scale, smallest, bound)
    match fmt.rule:
        case "rceil" | "pow2":
            up = e("Greater", largest, e("Mul", scale, float(item.max)))
        case "ceil":
            up = e("Greater", largest, e("Mul", scale, 2.0**item.emax))
        case "even":
            edge = (2.0 - 2.0 ** -(item.mantissa_bits + 1)) * 2.0**item.emax
            up = e("GreaterOrEqual", largest, e("Mul", scale, edge))
        case _:
            return scale
    return e("Min", e("Where", up, e("Mul", scale, 2.0), scale), bound)


def _power_bound(fmt: ScaledFormat) -> float:
    return math.ldexp(1.0, math.frexp(fmt.scale_bound)[1] - 1)


def _round_scale(e: Emitter, scale: ir.Value, fmt: ScaledFormat,
                 top: float = math.inf) -> ir.Value:
    """Nearest value of the scale format, of what is at most ``top``."""
    bounded = e("Min", scale, min(top, fmt.scale_bound))
    if fmt.scale.name == "f32":
        return bounded
    if fmt.scale.name in ("bf16", "f16"):
        kind = ir.DataType.BFLOAT16 if fmt.scale.name == "bf16" else ir.DataType.FLOAT16
        return e("Cast", e("Cast", bounded, to=int(kind)), to=FLOAT)
    return round_scale(e, bounded, fmt.scale)


def _find_two_level(e: Emitter, largest: ir.Value, fmt: ScaledFormat,
                    given: torch.Tensor | None) -> Scales:
    """TransformerEngine's order of operations, see ``scaleprop.formats.scales``."""
    item, top = fmt.element, target(fmt)
    if given is None:
        whole = e.reduce("ReduceMax", largest, None)
        bound = top
    else:  # of other data: scales of blocks may go beyond the target
        whole = e.f32((given * (top * item.max)).numpy())
        bound = math.inf
    whole = e("Where", e("Equal", whole, 0.0), top * item.max, whole)
    encode = e("Min", e("Div", top * item.max, whole), FLT_MAX)
    if given is None:
        outer = e("Max", e("Div", whole, top * item.max), 2.0**-128)
        outer = e("Add", outer, e("Sub", whole, whole))  # NaN, as is all, where that is not finite
    else:
        outer = e.f32(given.numpy())
    if fmt.rule in POWER_RULES or not fmt.scale.has_zero:
        scale = _power_scale(e, e("Mul", largest, encode), fmt)
    else:
        per_amax = e("Mul", encode, 1.0 / item.max)
        scale = _round_scale(e, e("Mul", largest, per_amax), fmt, bound)
    data = e("Min", e("Reciprocal", e("Mul", scale, e("Reciprocal", encode))), FLT_MAX)
    return Scales(scale, encode=data, outer=outer, largest=largest)


def _find_affine(e: Emitter, x: ir.Value, fmt: ScaledFormat, axes: Sequence[int] | None,
                 keep: bool) -> Scales:
    assert isinstance(fmt.element, IntegerElement)
    levels = float(fmt.element.levels)
    low = e("Min", e.reduce("ReduceMin", x, axes, keep), 0.0)
    high = e("Max", e.reduce("ReduceMax", x, axes, keep), 0.0)
    span = e("Sub", high, low)
    scale = _round_scale(e, e("Div", span, levels), fmt)
    scale = e("Where", e("Equal", scale, 0.0), 1.0, scale)
    zero = e("Clip", e("Round", e("Div", e("Neg", low), scale)), 0.0, levels)
    return Scales(scale, zero_code=e("Cast", zero, to=UINT8), zero_point=zero)
