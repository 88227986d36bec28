"""Numbers inside kernels: bits of float32, rounding to codes, scales of groups.

What depends on a format comes as constants, E an ``Element`` and S a ``Scaling``, and is compiled
in; they are tuples, whose places are numbered as the fields are in ``..constants``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from scaleprop.formats.scaled import FLT_MAX

INF = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
FLOAT_MAX = tl.constexpr(FLT_MAX)
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # added and subtracted: the nearest integer, ties to even


@triton.jit
def as_bits(x):
    """Bits of float32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """float32 of bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    """Bits of \\|x\\|: integers that compare as the numbers do, Inf above all and NaN above Inf."""
    return as_bits(x) & MAGNITUDE


@triton.jit
def nearest_integer(x):
    """Ties to even, for \\|x\\| ≤ 2^22."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def encode(x, E: tl.constexpr):
    """int32 codes of float32 in units of the element: nearest, ties to even, saturated."""
    size = magnitude(x)
    unknown = size > INF
    negative = as_bits(x) < 0
    if E[0]:
        steps = tl.minimum(as_float(tl.where(unknown, 0, size)) * E[7], E[5] * 1.0)
        whole = nearest_integer(steps).to(tl.int32)
        return tl.where(negative, -whole, whole) & ((1 << E[1]) - 1)
    if not E[2]:
        size = tl.where(negative, 0, size)
    size = tl.minimum(size, E[5])
    shift: tl.constexpr = 23 - E[3]
    half: tl.constexpr = (1 << (shift - 1)) - 1
    normal = (size + half + ((size >> shift) & 1)) >> shift
    normal -= (127 - E[4]) << E[3]
    subnormal = nearest_integer(as_float(tl.minimum(size, E[6])) * E[7]).to(tl.int32)
    code = tl.where(size < E[6], subnormal, normal)
    code = tl.where(unknown, E[8] if E[8] >= 0 else 0, code)
    if E[2]:
        code |= negative.to(tl.int32) << (E[1] - 1)
    return code


@triton.jit
def goes_up(delta, drawn, BITS: tl.constexpr, MODE: tl.constexpr):
    """Whether ``delta`` in [0, 1) rounds up, by a number of BITS random bits: MODE is the place
    in ``scaleprop.formats.rounding.MODES``."""
    scaled = delta * (1 << BITS)
    threshold = ((1 << BITS) - drawn).to(tl.float32)
    if MODE == 1:
        return nearest_integer(scaled) >= threshold
    if MODE == 2:
        whole = tl.floor(scaled)
        rest = scaled - whole
        even = whole == tl.floor(whole * 0.5) * 2.0
        odd = whole + ((rest > 0.5) | ((rest == 0.5) & even)).to(tl.float32)
        return odd >= threshold
    if MODE == 3:
        return scaled >= threshold - 0.5
    return scaled >= threshold


@triton.jit
def encode_drawn(x, drawn, E: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """As ``encode``, rounded up or down in magnitude by random numbers."""
    size = magnitude(x)
    unknown = size > INF
    if E[0]:
        steps = tl.minimum(as_float(tl.where(unknown, 0, size)) * E[7], E[5] * 1.0)
        ulp = tl.full(steps.shape, 1.0 / E[7], tl.float32)
    else:
        if not E[2]:
            size = tl.where(as_bits(x) < 0, 0, size)
        size = tl.minimum(size, E[5])
        power = tl.maximum(size & INF, E[6])
        ulp = as_float(power - (E[3] << 23))
        steps = as_float(size) * as_float((254 << 23) - power + (E[3] << 23))
    whole = tl.floor(steps)
    whole += goes_up(steps - whole, drawn, BITS, MODE).to(tl.float32)
    rounded = as_bits(whole * ulp)
    rounded = tl.where(unknown, NAN, rounded) | (as_bits(x) & ~MAGNITUDE)
    return encode(as_float(rounded), E)


@triton.jit
def decode(code, E: tl.constexpr):
    """float32 of float codes."""
    size = code & ((1 << (E[1] - E[2])) - 1)
    normal = as_float((size << (23 - E[3])) + ((127 - E[4]) << 23))
    value = tl.where(size < (1 << E[3]), size.to(tl.float32) * (1.0 / E[7]), normal)
    if E[9]:
        special = INF | ((size & ((1 << E[3]) - 1)) << (23 - E[3]))
        value = tl.where(size >= (((1 << (E[1] - 1 - E[3])) - 1) << E[3]), as_float(special), value)
    if E[8] >= 0:
        value = tl.where(size == E[8], as_float(tl.full(size.shape, NAN, tl.int32)), value)
    if E[2]:
        value = as_float(as_bits(value) | ((code >> (E[1] - 1)) << 31))
    return value


@triton.jit
def below(x, limit: tl.constexpr):
    """min(x, limit); NaN stays."""
    return tl.where(x > limit, limit, x)


@triton.jit
def power_scale(amax, S: tl.constexpr):
    """2^e by the rule; of amax that is finite."""
    scale = as_float(as_bits(amax) & INF) * S[4]
    scale = tl.minimum(tl.maximum(scale, S[5]), S[6])
    if S[7] > 0:
        limit = scale * S[7]
        up = amax >= limit if S[8] else amax > limit
        scale = below(tl.where(up, scale * 2.0, scale), S[6])
    return scale


@triton.jit
def rounded_scale(scale, S: tl.constexpr):
    """To the scale's format."""
    scale = below(scale, S[6])
    if S[12] == 2:
        scale = decode(encode(scale, S[11]), S[11])
    return scale


@triton.jit
def one_level(amax, S: tl.constexpr):
    """Scales of groups by their amax; NaN where that is not finite."""
    if S[0]:
        scale = power_scale(amax, S)
        if S[2]:
            scale = tl.where(amax == 0.0, 1.0, scale)
    else:
        scale = rounded_scale(tl.div_rn(amax, tl.full(amax.shape, S[3], tl.float32)), S)
        scale = tl.where(scale == 0.0, 1.0, scale)
    return tl.where(amax < float("inf"), scale, float("nan"))


@triton.jit
def tensor_factors(amax, S: tl.constexpr):
    """Of the tensor's amax, a scalar: its scale, what encodes, and 1/that."""
    full: tl.constexpr = S[9] * S[3]
    scale = tl.maximum(tl.div_rn(amax, full), 2.0**-128)
    scale = tl.where(amax == 0.0, 1.0, scale)
    scale = tl.where(amax < float("inf"), scale, float("nan"))
    encoding = below(tl.div_rn(full, amax), FLOAT_MAX)
    encoding = tl.where((amax == 0.0) | (encoding == 0.0), 1.0, encoding)
    return scale, encoding, tl.div_rn(1.0, encoding)


@triton.jit
def two_level(amax, encoding, decoding, S: tl.constexpr):
    """Scales of blocks below a tensor's, and what their data is multiplied by."""
    power: tl.constexpr = S[0]
    scale = power_scale(amax * encoding, S) if power else rounded_scale(
        amax * (encoding * S[10]), S)
    product = scale * decoding
    return scale, below(tl.div_rn(tl.full(product.shape, 1.0, tl.float32), product), FLOAT_MAX)


@triton.jit
def stored_scale(scale, S: tl.constexpr):
    """float32, or codes."""
    if S[12] == 0:
        return scale
    else:
        return as_bits(scale) >> 23 if S[12] == 1 else encode(scale, S[11])


@triton.jit
def bfloat16_bits(x):
    """int16: float32 rounded to bfloat16, ties to even."""
    bits = as_bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(magnitude(x) > INF, (bits >> 16) | 0x40, rounded).to(tl.int16)


@triton.jit
def store_float(place, values, mask):
    """float32 values where floats are kept, or in int16 the bits of bfloat16."""
    if place.dtype.element_ty == tl.int16:
        tl.store(place, bfloat16_bits(values), mask=mask)
    else:
        tl.store(place, values.to(place.dtype.element_ty), mask=mask)
