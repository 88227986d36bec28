"""Counter-based random bits: against published vectors, big integers, and statistics."""

import re

import pytest
import torch
from scipy import stats
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from scaleprop.errors import FormatError
from scaleprop.formats.random import MAX_STEP, philox, random_bits, random_signs

WORD = 0xFFFFFFFF


def philox_of_integers(counter, key):
    """Philox4x32-10 with Python's integers, as the paper prints it."""
    (a, b, c, d), (first, second) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = ((right >> 32) ^ b ^ first, right & WORD,
                      (left >> 32) ^ d ^ second, left & WORD)
        first, second = (first + 0x9E3779B9) & WORD, (second + 0xBB67AE85) & WORD
    return a, b, c, d


def number(row, column, seed, stream, step, bits):
    """The number of one element: which call of Philox has it, and where."""
    width = next(w for w in (8, 16, 32) if bits <= w)
    kind = {8: 1, 16: 2, 32: 3}[width]
    group, place = divmod(row, 128 // width)
    counter = (step & WORD, column, (step >> 32) | kind << 28, group)
    word, part = divmod(place, 32 // width)
    return philox_of_integers(counter, (seed, stream))[word] >> (part * width) & ((1 << bits) - 1)


# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, result
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter, key, expected):
    assert philox_of_integers(counter, key) == expected
    words = philox([torch.tensor(word) for word in counter], key)
    assert [int(word) for word in words] == list(expected)


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 16, 17, 31])
@pytest.mark.parametrize("step, first", [(0, (0, 0)), (2**41 + 7, (29, 5)), (MAX_STEP - 1, (3, 0))])
def test_every_number_is_that_of_its_place(bits, step, first):
    drawn = random_bits([21, 3], 11, WORD, step, bits, first)
    assert drawn.dtype == torch.int32
    expected = [[number(first[0] + r, first[1] + c, 11, WORD, step, bits) for c in range(3)]
                for r in range(21)]
    assert drawn.tolist() == expected


@pytest.mark.parametrize("bits", [3, 8, 12, 22])
def test_slices_are_slices_of_the_whole(bits):
    whole = random_bits([70, 45], 1, 2, 3, bits)
    for first in ((0, 0), (1, 0), (16, 7), (37, 44)):
        for rows, columns in ((1, 1), (13, 1), (33, 1)):
            part = random_bits([rows, columns], 1, 2, 3, bits, first)
            assert torch.equal(part, whole[first[0]:, first[1]:][:rows, :columns])
    assert random_bits([0, 4], 1, 2, 3, bits).shape == (0, 4)
    assert random_bits([4, 0], 1, 2, 3, bits).shape == (4, 0)


def test_step_is_an_input_of_a_traced_graph():
    def draw(step):
        return random_bits([5, 7], 1, 2, step, 8), random_signs(6, 1, 2, step)

    graph = make_fx(draw)(torch.tensor(0))
    for step in (0, 1, 2**33 + 5):
        for traced, eager in zip(graph(torch.tensor(step)), draw(step), strict=True):
            assert torch.equal(traced, eager)
        assert torch.equal(draw(torch.tensor([step]))[0], draw(step)[0])


@pytest.mark.parametrize("bits", [8, 22])
def test_compiled_fuses_and_is_the_same(bits):
    """Odd sizes, so that vectorised loops have rests; nothing is left to ATen's own kernels."""
    torch._dynamo.reset()

    def draw(step, x):
        return random_bits(x.shape, 7, 8, step, bits, (5, 3)) + x

    x = torch.arange(37 * 53, dtype=torch.int32).reshape(37, 53)
    compiled = torch.compile(draw, fullgraph=True)
    result, (code,) = run_and_get_code(compiled, torch.tensor(9), x)
    assert torch.equal(result, draw(9, x))
    assert not re.search(r"extern_kernels\.|torch\.ops\.aten\.\w", code)
    # the words of all rounds are computed in one loop, the numbers in another that reads them
    assert code.count("for(int64_t x0=") == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(torch.tensor(10), x), draw(10, x))


def test_compiled_with_symbolic_sizes():
    torch._dynamo.reset()

    def draw(step, x):
        return random_bits(x.shape, 7, 8, step, 8, (3 * x.shape[0], 0)) + x

    compiled = torch.compile(draw, fullgraph=True, dynamic=True)
    for rows, columns in ((37, 53), (64, 16), (3, 100)):
        x = torch.zeros(rows, columns, dtype=torch.int32)
        assert torch.equal(compiled(torch.tensor(4), x), draw(4, x))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_uniform(bits):
    counts = torch.bincount(random_bits([512, 512], 3, 4, 5, bits).flatten())
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("bits", [12, 22, 31])
def test_top_and_low_bits_of_wide_numbers_are_uniform(bits):
    drawn = random_bits([512, 512], 3, 4, 5, bits)
    for part in (drawn & 255, drawn >> (bits - 8)):
        counts = torch.bincount(part.flatten(), minlength=256)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def _independent(a, b, levels=16):
    """Whether pairs of numbers are as frequent as those of independent ones: chi-square."""
    pairs = torch.bincount((a * levels + b).flatten(), minlength=levels * levels)
    table = pairs.reshape(levels, levels).numpy()
    return stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("other", [
    dict(step=6), dict(step=5 + 2**32), dict(stream=5), dict(seed=4), dict(bits=12), dict(bits=20),
    dict(first=(1, 0)), dict(first=(0, 1)), dict(first=(16, 0)), dict(first=(4, 0)),
])
def test_other_steps_streams_seeds_widths_and_places_are_independent(other):
    arguments = dict(seed=3, stream=4, step=5, bits=4)
    a = random_bits([512, 256], **arguments)
    b = random_bits([512, 256], **(arguments | other)) & 15
    assert _independent(a, b)


def test_signs():
    signs = random_signs(1 << 16, 1, 2, 3)
    assert signs.dtype == torch.float32 and set(signs.tolist()) == {-1.0, 1.0}
    assert torch.equal(random_signs(100, 1, 2, torch.tensor(3)), signs[:100])
    assert stats.binomtest(int((signs > 0).sum()), len(signs)).pvalue > 1e-3
    first = philox_of_integers((3, 7, 0, 0), (1, 2))[0]
    assert signs[7] == 1 - 2 * (first & 1)
    numbers = random_bits([1, 1 << 16], 1, 2, 3, 1)[0]
    for other in (random_signs(1 << 16, 1, 2, 4), random_signs(1 << 16, 1, 3, 3),
                  1.0 - 2.0 * numbers, signs.roll(1)):
        assert _independent((signs > 0).long(), (other > 0).long(), levels=2)


@pytest.mark.parametrize("change, message", [
    (dict(seed=-1), "seed -1 is not in"),
    (dict(stream=1 << 32), "stream 4294967296 is not in"),
    (dict(step=-1), "step -1 is not in"),
    (dict(step=MAX_STEP), "is not in 0..2"),
    (dict(step=torch.tensor(1.0)), "pass one int64"),
    (dict(step=torch.zeros(2, dtype=torch.int64)), "pass one int64"),
    (dict(bits=0), "1 to 31"),
    (dict(bits=32), "1 to 31"),
    (dict(shape=[4]), "two axes"),
    (dict(shape=[4, -1]), "sizes and offsets"),
    (dict(first=(-1, 0)), "sizes and offsets"),
])
def test_bad_inputs(change, message):
    arguments = dict(shape=[4, 4], seed=0, stream=0, step=0, bits=8) | change
    with pytest.raises(FormatError, match=message):
        random_bits(**arguments)


def test_bad_signs():
    with pytest.raises(FormatError, match="seed"):
        random_signs(4, -1, 0, 0)
    with pytest.raises(FormatError, match="sizes"):
        random_signs(-4, 0, 0, 0)
