"""The mean of a whole quantizer over a million draws is what was quantized, where recipes say so.

Rows hold the same numbers, and each its own random bits: a row is a draw. Each element's mean is
off by its own standard error; all of these together are one χ² statistic.
"""

import math

import pytest
import torch
from scipy import stats

from scaleprop.formats.random import random_bits
from scaleprop.ops.hadamard import hadamard
from scaleprop.ops.operands import eden_operand, quantize_operand

CHUNK, CHUNKS = 1 << 16, 16  # 2^20 draws
COLUMNS = 32
# 8 bits round the odds to 1/256 of a step, which a million draws tell from the truth; 16 do not
BITS = 16


def vector():
    """Numbers of every size, the largest of which OCP's floor rule puts at 7.9 of 6."""
    x = torch.randn(COLUMNS, generator=torch.Generator().manual_seed(5))
    x[7], x[8] = 3.95, -3.7
    return x


def moments(name, **options):
    """(mean, variance) of each element, float64, over all draws."""
    total = square = torch.zeros(COLUMNS, dtype=torch.float64)
    x = vector().expand(CHUNK, COLUMNS)
    for step in range(CHUNKS):
        bits = random_bits([CHUNK, COLUMNS], 1, 2, step, BITS)
        values, outer = quantize_operand(x, name, 1, f"stochastic:{BITS}", bits, **options)
        drawn = values.double() * outer.double() / options.get("prescale", 1.0)
        total, square = total + drawn.sum(0), square + drawn.square().sum(0)
    count = CHUNK * CHUNKS
    mean = total / count
    return mean, (square / count - mean.square()).clamp(min=0.0)


def scores(mean, variance, expected, count):
    """Errors in standard errors; those of elements that every draw left the same must be 0."""
    moved = variance > 0
    torch.testing.assert_close(mean[~moved], expected[~moved], rtol=1e-7, atol=0)
    return ((mean - expected) / (variance / count).sqrt())[moved]


@pytest.mark.parametrize("name, options", [
    ("mxfp4", dict(prescale=0.75)), ("mxfp4:rceil", {}), ("nvfp4", dict(headroom=17 / 16)),
    ("nvfp4", dict(headroom=17 / 16, tensor_amax=torch.tensor(4.0))),
    ("fp8", {}), ("mxfp8", dict(prescale=0.75)), ("int4[1x32]*f32", {}),
])
def test_unbiased_over_a_million_draws(name, options):
    dtype = torch.float32 if name.startswith("int4") else torch.bfloat16
    mean, variance = moments(name, dtype=dtype, **options)
    z = scores(mean, variance, vector().double(), CHUNK * CHUNKS)
    assert stats.chi2.sf(float(z.square().sum()), len(z)) > 1e-3
    assert abs(float(z.mean())) < 4 / math.sqrt(len(z))


def test_saturation_is_the_bias_of_the_floor_rule():
    """Without the prescale, what lies beyond 6 is 6: 3.95 becomes 3, in every draw."""
    mean, variance = moments("mxfp4")
    x = vector().double()
    assert mean[7] == 3.0 and mean[8] == -3.0 and not variance[7:9].any()
    z = scores(torch.cat([mean[:7], mean[9:]]), torch.cat([variance[:7], variance[9:]]),
               torch.cat([x[:7], x[9:]]), CHUNK * CHUNKS)
    assert stats.chi2.sf(float(z.square().sum()), len(z)) > 1e-3


def test_saturation_is_the_bias_of_nvfp4():
    """Block scales of 270 become 256: 3.95 is 6.33 of them, so 6, in every draw."""
    mean, variance = moments("nvfp4", tensor_amax=torch.tensor(448 * 3.95 / 270))
    assert variance[7] == 0 and mean[7] == pytest.approx(3.95 * 256 / 270, rel=1e-6)


def unrotated(x, step, quantized):
    """Each row rotated by signs of its own, quantized or not, and rotated back; float64."""
    signs = 1.0 - 2.0 * random_bits(x.shape, 3, 4, step, 1).float()
    values = hadamard(x * signs, 128)
    if quantized == "eden":
        bits = random_bits([len(x), 8], 3, 5, step, BITS)
        values, outer = eden_operand(values, "nvfp4", 1, bits)
    else:
        values, outer = quantize_operand(values, "nvfp4", 1)
    return hadamard(values.double() * outer.double(), 128, transpose=True) * signs


@pytest.mark.parametrize("kind, unbiased", [("eden", True), ("nearest", False)])
def test_eden_is_unbiased_over_rotations(kind, unbiased):
    """Of x̂ along x and across it; rounding to nearest alone shrinks x along itself."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(6))
    rows, chunks = 1 << 13, 16  # 2^17 rotations of 128 elements: 16.8 million numbers
    along, total, square = [], 0.0, 0.0
    for step in range(chunks):
        drawn = unrotated(x.expand(rows, 128), step, kind)
        along.append(drawn @ x.double() / x.double().square().sum())
        across = drawn - along[-1].unsqueeze(1) * x.double()
        total, square = total + across.sum(0), square + across.square().sum(0)
    part, count = torch.cat(along), rows * chunks
    z = float((part.mean() - 1) / (part.std() / math.sqrt(count)))
    mean = total / count
    every = mean / ((square / count - mean.square()) / count).sqrt()
    p = stats.chi2.sf(float(every.square().sum()), 127)  # 128 numbers, across x
    assert (abs(z) < 4 and p > 1e-3) if unbiased else (z < -100 and p < 1e-9), (z, p)
