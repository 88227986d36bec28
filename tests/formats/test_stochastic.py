"""Stochastic rounding: against gfloat with supplied bits, against fractions, and exact odds."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from format_support import FLOATS, SMALL, gfloat_format, grid, same, telling_inputs
from gfloat import RoundMode, round_float, round_ndarray

from scaleprop.errors import FormatError
from scaleprop.formats import fake_quantize, quantize, reference
from scaleprop.formats.elements import (
    CodebookElement,
    FloatElement,
    IntegerElement,
    element,
)
from scaleprop.formats.rounding import Rounding, stochastic

MODES = {"stochastic": RoundMode.Stochastic, "stochastic_odd": RoundMode.StochasticOdd,
         "stochastic_fast": RoundMode.StochasticFast,
         "stochastic_fastest": RoundMode.StochasticFastest}
ELEMENTS = ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "ue5m3", "e4m2", "e5m10"]


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_equal_to_gfloat_with_the_same_bits(name, mode, width):
    item = element(name)
    x = telling_inputs(item, limit=200)
    x = x[(x.abs() > 1e-30) & (x >= item.min)]
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << width, (8, len(x))))
    x = x.expand(8, -1)
    ours = stochastic(x, item, Rounding(mode, width), bits)
    theirs = round_ndarray(gfloat_format(item), x.double().numpy(), MODES[mode], sat=True,
                           srbits=bits.numpy(), srnumbits=width)
    assert torch.equal(ours.double(), torch.from_numpy(np.asarray(theirs)))
    assert torch.equal(stochastic(x.double(), item, Rounding(mode, width), bits), ours.double())


@pytest.mark.parametrize("mode", list(MODES))
def test_equal_to_gfloat_scalar_on_every_bit_pattern(mode):
    item, info = element("e2m1"), gfloat_format(element("e2m1"))
    x = torch.linspace(-7, 7, 113)
    for bits in range(16):
        r = torch.full(x.shape, bits)
        ours = stochastic(x, item, Rounding(mode, 4), r)
        theirs = [round_float(info, float(v), MODES[mode], sat=True, srbits=bits, srnumbits=4)
                  for v in x]
        assert ours.tolist() == theirs


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int4", "mxint8", "nf4", "log2s4", "binary",
                                  "e8m0", "e8m3", "ternary"])
def test_equal_to_the_scalar_reference(name, mode):
    item = element(name)
    x = telling_inputs(item, limit=60)
    x = x[(x >= item.min) & ((x.abs() > 1e-9) | (x == 0))]
    rounding = Rounding(mode, 5)
    bits = torch.from_numpy(np.random.default_rng(1).integers(0, 32, len(x)))
    ours = stochastic(x, item, rounding, bits)
    expected = [reference.round_value(float(v), item, rounding, int(r))
                for v, r in zip(x, bits, strict=True)]
    assert torch.equal(ours.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 4, 8])
def test_all_random_bits_give_the_exact_odds(n):
    """P(up) over every bit pattern: RNE(δ·2^n)/2^n, and so no bias where δ·2^n is an integer."""
    item = element("e2m1")
    deltas = [Fraction(k, 1 << (n + 2)) for k in range(1 << (n + 2))]
    for low, high in zip((0.0, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 1.5, 3.0, 6.0), strict=True):
        x = torch.tensor([low + float(d) * (high - low) for d in deltas])
        every = torch.arange(1 << n).unsqueeze(1)
        rounded = stochastic(x.expand(1 << n, -1), item, Rounding("stochastic", n),
                             every.expand(-1, len(x)))
        ups = (rounded == high).sum(0).tolist()
        assert ups == [reference.round_half_even(d * 2**n) for d in deltas]
        exact = rounded.double().mean(0)[:: 4]
        assert torch.equal(exact, x.double()[::4])
        assert abs(float((rounded.double().mean(0) - x).sum())) < 1e-6 * len(x) + high - low


def _intervals(item, limit=300):
    """(low, high) of neighbouring values, of magnitudes where values have a sign of their own."""
    values = grid(item)
    if isinstance(item, FloatElement | IntegerElement):
        values = [value for value in values if value >= 0]
    pairs = list(itertools.pairwise(values))
    return pairs if len(pairs) <= limit else pairs[:100] + pairs[-100:]


def _odds(mode, delta, n):
    """How many of all 2^n random numbers send lo + delta·ulp up, as ``rounding.Rounding`` says."""
    steps = delta * 2**n
    below = steps.numerator // steps.denominator
    rest = steps - below
    half = Fraction(1, 2)
    match mode:
        case "stochastic":
            return below + (rest > half or (rest == half and below % 2 == 1))
        case "stochastic_odd":
            return below + (rest > half or (rest == half and below % 2 == 0))
        case "stochastic_fast":
            return below + (rest >= half)
        case _:
            return below


def _drawn(item, mode, n, deltas):
    """Every interval × δ × random number: (lows, highs, x, what x is rounded to)."""
    pairs = torch.tensor(_intervals(item), dtype=torch.float64)
    low, high = pairs[:, :1], pairs[:, 1:]
    x = low + torch.tensor([float(d) for d in deltas], dtype=torch.float64) * (high - low)
    every = torch.arange(1 << n).reshape(-1, 1, 1).expand(-1, *x.shape)
    return low, high, x, stochastic(x.expand_as(every), item, Rounding(mode, n), every)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", [name for name in SMALL if name != "e8m0"])
def test_odds_of_going_up_are_exact_between_all_values(name, mode):
    """Every element, every pair of neighbours, δ in eighths of a random number's step, all r."""
    item, n = element(name), 3
    deltas = [Fraction(k, 8 << n) for k in range(8 << n)]
    low, high, _, rounded = _drawn(item, mode, n, deltas)
    assert bool(((rounded == low) | (rounded == high)).all())
    expected = torch.tensor([_odds(mode, delta, n) for delta in deltas])
    if isinstance(item, CodebookElement):  # δ of uneven neighbours is rounded: not on a boundary
        keep = [delta * (8 << n) % 4 != 0 for delta in deltas]
    else:
        keep = [True] * len(deltas)
    ups = ((rounded == high).sum(0) == expected)[:, torch.tensor(keep)]
    assert bool(ups.all())


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", [name for name in SMALL if name in FLOATS and name != "e8m0"
                                  and element(name).fraction_bits])
def test_all_random_numbers_round_as_in_gfloat(name, mode):
    item, n = element(name), 3
    deltas = [Fraction(k, 4 << n) for k in range(4 << n)]
    _, _, x, rounded = _drawn(item, mode, n, deltas)
    bits = np.arange(1 << n).reshape(-1, 1, 1) + np.zeros(x.shape, dtype=np.int64)
    theirs = round_ndarray(gfloat_format(item), np.broadcast_to(x.numpy(), bits.shape).copy(),
                           MODES[mode], sat=True, srbits=bits, srnumbits=n)
    assert torch.equal(rounded, torch.from_numpy(np.asarray(theirs)))


@pytest.mark.parametrize("mode", list(MODES))
def test_eight_random_bits_have_exact_odds(mode):
    item, n = element("e2m1"), 8
    deltas = [Fraction(k, 4 << n) for k in range(4 << n)]
    low, high, _, rounded = _drawn(item, mode, n, deltas)
    expected = torch.tensor([_odds(mode, delta, n) for delta in deltas])
    assert bool(((rounded == high).sum(0) == expected).all())
    assert bool(((rounded == low) | (rounded == high)).all())


def test_biases_of_the_fast_rules():
    """Mean of P(up) - δ over a fine grid of δ: 0 for fast, -2^-(n+1) ulp for fastest."""
    n, item = 4, element("int8")
    delta = (torch.arange(1 << 10) + 0.5) / (1 << 10)
    every = torch.arange(1 << n).unsqueeze(1).expand(-1, len(delta))
    for mode, bias in (("stochastic_fast", 0.0), ("stochastic_fastest", -(2.0 ** -(n + 1)))):
        rounded = stochastic(delta.expand(1 << n, -1), item, Rounding(mode, n), every)
        assert float((rounded.double().mean(0) - delta).mean()) == pytest.approx(bias, abs=1e-12)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["e2m1", "e4m3", "int4", "nf4", "binary"])
def test_representable_values_never_move(name, mode):
    item = element(name)
    x = torch.tensor([item.decode(code) for code in item.codes])
    x = x[x.isfinite() & (x >= item.min)]
    for bits in (0, 255):
        assert same(stochastic(x, item, Rounding(mode, 8), torch.full(x.shape, bits)), x)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8", "int8", "int8+zp", "int4"])
def test_seeded_generator_repeats_and_is_close_to_unbiased(name):
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))

    def draw(seed):
        return fake_quantize(x, name, rounding="stochastic",
                             generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    name_up = f"{name}:rceil" if name.startswith("mx") else name  # no saturation, which biases
    draws = torch.stack([fake_quantize(x, name_up, rounding="stochastic",
                                       generator=torch.Generator().manual_seed(k))
                         for k in range(64)])
    spread = draws.std(0).mean() / 64**0.5
    assert abs(float((draws.mean(0) - x).mean())) < 4 * float(spread) / x.numel() ** 0.5 + 2e-4


def test_given_bits_are_used_along_any_axis():
    x = torch.randn(64, 8)
    bits = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    a = quantize(x, "mxfp4", axis=0, rounding="stochastic", bits=bits)
    b = quantize(x.t().contiguous(), "mxfp4", rounding="stochastic", bits=bits.t().contiguous())
    assert torch.equal(a.codes(), b.codes()) and torch.equal(a.dequantize(), b.dequantize().t())
    f = fake_quantize(x, "mxfp4", axis=0, rounding="stochastic", bits=bits)
    assert torch.equal(f, a.dequantize())


def test_bits_are_checked():
    x = torch.randn(4, 32)
    good = torch.zeros(4, 32, dtype=torch.int64)
    cases = [
        (dict(rounding="stochastic", bits=good.float()), "pass integers"),
        (dict(rounding="stochastic", bits=good[:2]), "one number of random bits an element"),
        (dict(rounding="stochastic", bits=good + 256), "'stochastic:9'"),
        (dict(rounding="stochastic", bits=good - 1), "0..255"),
        (dict(bits=good), "rounding='stochastic'"),
        (dict(generator=torch.Generator()), "needs a stochastic rounding"),
        (dict(rounding="stochastic", bits=good, generator=torch.Generator()), "no bits"),
    ]
    for arguments, message in cases:
        with pytest.raises(FormatError, match=message):
            fake_quantize(x, "mxfp4", **arguments)
        with pytest.raises(FormatError, match=message):
            quantize(x, "mxfp4", **arguments)
    fake_quantize(x, "mxfp4", rounding="stochastic:16", bits=good + 65535)
