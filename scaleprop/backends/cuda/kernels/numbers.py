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
_MAGIC_BITS = tl.constexpr(0x4B400000)
_LEAST_NORMAL = tl.constexpr(0x00800000)
_LEAST_POWER = tl.constexpr(0x00400000)  # 2^-127
_GREATEST_POWER = tl.constexpr(0x7F000000)  # 2^127


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
def whole_number(x):
    """int32: the nearest integer, ties to even, for \\|x\\| ≤ 2^22; conversions are slow."""
    return as_bits(x + _MAGIC) - _MAGIC_BITS


@triton.jit
def float_of(x):
    """float32 of integers within 2^22, as ``whole_number`` makes these of it."""
    return as_float(x + _MAGIC_BITS) - _MAGIC


@triton.jit
def divided(x, scale):
    """x / scale, which broadcasts: rounded as division rounds it, wherever that is above 2^-30 and
    below 2^64, beyond which nothing else becomes of it as a code.

    One division for each scale: a quotient by the reciprocal is off by less than two in its last
    place, and made right by its remainder before it is rounded again (Markstein, "Computation of
    elementary functions on the IBM RISC System/6000 processor", 1990), far from where remainders
    underflow.
    """
    lift = tl.where(scale < 2.0**-60, 2.0**80, tl.where(scale > 2.0**100, 2.0**-40, 1.0))
    scale *= lift
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    x *= lift
    near = x * inverse
    exact = tl.fma(tl.fma(-near, scale, x), inverse, near)
    return tl.where((tl.abs(near) < 2.0**64) & (near != 0.0), exact, near)  # -0 stays


@triton.jit
def encode(x, E: tl.constexpr, KNOWN: tl.constexpr = False):
    """int32 codes of float32 in units of the element: nearest, ties to even, saturated. KNOWN: what
    becomes of NaN does not matter.

    A power of two that is 2^(23 - fraction) times that of x, added to it, rounds it to its last
    bit: what is added so counts from that power's code on.
    """
    if E[10] == 1:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    elif E[10] == 2:
        return x.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.int32)
    else:
        if E[0]:
            steps = tl.minimum(tl.maximum(x * E[7], -1.0 * E[5]), 1.0 * E[5])
            code = whole_number(steps)
            if not KNOWN:
                code = tl.where(magnitude(x) > INF, 0, code)
            return code & ((1 << E[1]) - 1)
        else:
            most = as_float(tl.full(x.shape, E[5], tl.int32))
            size = tl.minimum(tl.abs(x) if E[2] else tl.maximum(x, 0.0), most)
            power = tl.maximum(as_bits(size) & INF, E[6])
            large = power + ((23 - E[3]) << 23)
            code = as_bits(size + as_float(large)) - large
            code += (power - E[6]) >> (23 - E[3])
            if not KNOWN:
                code = tl.where(magnitude(x) > INF, E[8] if E[8] >= 0 else 0, code)
            if E[2]:
                code |= (as_bits(x) >> (32 - E[1])) & (1 << (E[1] - 1))
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
    """float32 of float codes: where its exponent and fraction are, times what the bias lacks."""
    size = code & ((1 << (E[1] - E[2])) - 1)
    value = as_float(size << (23 - E[3])) * 2.0 ** (127 - E[4])
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
        if S[11][10] == 1:
            scale = scale.to(tl.float8e4nv).to(tl.float32)
        else:
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
def reciprocal_power(scale):
    """1/2^e of -127 ≤ e ≤ 127, exactly; NaN of NaN."""
    bits = as_bits(scale)
    found = tl.where(bits < _LEAST_NORMAL, _GREATEST_POWER, _GREATEST_POWER - bits)
    found = tl.where(found == 0, _LEAST_POWER, found)
    return tl.where(scale == scale, as_float(found), float("nan"))


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
