"""Rounding to element formats in float32 arithmetic, a few passes over the data.

A float grid has ulp 2^(e-m) for |x| in [2^e, 2^(e+1)) and 2^(emin-m) below 2^(emin+1). Adding and
subtracting c rounds to the ulp of x + c, nearest-even, where c is an even multiple of that ulp. So
c must lie in the binade whose float32 ulp is the grid's: 2^(23-m)·|x| does. It also must have
trailing zeros, or x + c, where it crosses into the binade above, would be rounded off the grid; a
cast to float16 and back leaves them. That cast may round |x| up to a power of two: then x is so
close to it (2^-12) that the coarser grid gives the same. Below 2^(emin+1) the constant
1.5·2^(23-m+emin) serves. (The exponent's bits alone are slower: onnxruntime's bitwise operators
are not vectorised.)
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from scaleprop.backends.onnxruntime.quantized.emit import FLOAT, INT32, Emitter
from scaleprop.formats.elements import (
    CodebookElement,
    ElementFormat,
    FloatElement,
    IntegerElement,
)

_HALF_LOG = 0x00800000 - 0x003504F4 + 1  # added to float bits: carries into the exponent above √2


def why_not(element: ElementFormat) -> str | None:
    """Why values cannot be rounded to this element when the graph runs; None where they can."""
    if isinstance(element, IntegerElement):
        return None
    if isinstance(element, CodebookElement):
        if element.name == "log2u4":
            return None
        return f"{element.name} is a codebook without arithmetic rounding"
    assert isinstance(element, FloatElement)
    if not element.signed or not element.has_zero:
        return f"{element.name} has no sign or no zero: it is a scale format"
    if element.emax + 24 - element.mantissa_bits > 126:
        return f"{element.name} reaches too close to float32's largest value for exact rounding"
    return None


def clip(e: Emitter, x: ir.Value, element: ElementFormat) -> ir.Value:
    """``x`` limited to the element's range."""
    return e("Clip", x, float(element.min), float(element.max))


def round_to(e: Emitter, x: ir.Value, element: ElementFormat) -> ir.Value:
    """``x`` (float32, in units of the element) on the element's grid, saturated; NaN stays NaN."""
    if isinstance(element, IntegerElement):
        if element.unit == 1.0:
            return clip(e, e("Round", x), element)
        steps = e("Round", e("Mul", x, 1.0 / element.unit))
        return clip(e, e("Mul", steps, element.unit), element)
    if isinstance(element, CodebookElement):
        return _round_log2(e, x, element)
    assert isinstance(element, FloatElement)
    x = clip(e, x, element)
    return _on_grid(e, x, e("Abs", x), element)


def fineness(element: ElementFormat) -> int:
    """t > 0 where ``round_fine`` rounds values in units of 2^-t; 0 where it does not."""
    if not isinstance(element, FloatElement) or not element.signed or not element.has_zero:
        return 0
    fits = element.mantissa_bits == 1 and element.emax == element.emin + 2
    return 19 - element.emin if fits else 0


def round_fine(e: Emitter, x: ir.Value, element: FloatElement) -> ir.Value:
    """``round_to`` in units of 2^-t, in fewer nodes, for three binades of one mantissa bit.

    With the smallest binade [1, 2) and u = |x|, 3/2 + u²/8 lies in the binade of u, or in [1, 2)
    below, but for 4 ≤ u < √20, where the finer grid gives 4 too. So it times 2^23 steps is the
    constant to add and subtract. In these units that is x² + 3/2·2^23 steps. Adding and subtracting
    a larger constant leaves trailing zeros.
    """
    fine = fineness(element)
    x = e("Clip", x, math.ldexp(float(element.min), fine), math.ldexp(float(element.max), fine))
    steps = fine + element.emin - element.mantissa_bits + 23
    lowest, coarse = math.ldexp(1.5, steps), math.ldexp(1.5, steps + 10)
    magic = e("Sub", e("Add", e("Mul", x, x), coarse), coarse - lowest)
    return e("Sub", e("Add", x, magic), magic)


def round_scale(e: Emitter, x: ir.Value, element: FloatElement) -> ir.Value:
    """``round_to`` of what is neither negative nor above the largest value."""
    return _on_grid(e, x, x, element)


def _on_grid(e: Emitter, x: ir.Value, magnitude: ir.Value, element: FloatElement) -> ir.Value:
    """``x`` rounded, given |x|, which is in range."""
    digits = 23 - element.mantissa_bits
    lowest = math.ldexp(1.5, digits + element.emin)
    magic = e("Clip", e("Mul", _coarse(e, magnitude, element), math.ldexp(1.0, digits)), lowest)
    return e("Sub", e("Add", x, magic), magic)


def _coarse(e: Emitter, x: ir.Value, element: FloatElement) -> ir.Value:
    """x ≥ 0 in few bits, in its own binade or (barely) the one above; 0 where far below emin."""
    if element.emax > 14 or element.emin < -14:  # beyond float16: the middle of the binade
        return e("Mul", e.power_below(x), 1.5)
    return e("Cast", e("Cast", x, to=int(ir.DataType.FLOAT16)), to=FLOAT)


def _round_log2(e: Emitter, x: ir.Value, element: CodebookElement) -> ir.Value:
    """The power of two nearest in the logarithm: halves of an octave are mantissa √2."""
    bits = e("BitCast", clip(e, x, element), to=INT32)
    raised = e("Add", bits, e.builder.constant(_HALF_LOG, np.int32))
    mask = e.builder.constant(0x7F800000, np.int32)
    return e("BitCast", e("BitwiseAnd", raised, mask), to=FLOAT)
