"""Attention over a stored cache equals attention in float64 over what the cache decodes to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaleprop.backends.cuda.attention import Masking, attend
from scaleprop.backends.cuda.cache import KVCache
from scaleprop.errors import FormatError
from scaleprop.formats import parse
from scaleprop.formats.quantize import quantize_parts
from scaleprop.formats.scaled import ScaledFormat
from scaleprop.formats.tensor import dequantize_parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = 2e-6  # of the largest |v|: errors of scores in float32, here of size 10
FORMATS = ("e4m3[row]*f32", "int8[row]*f32", "int8[row]*f32+zp", "int4[row]*f32+zp", "mxfp8",
           "mxfp6", "mxfp4", "int4[1x128]*f32", "int4[1x32]*f16", "int4[1x32]*f32+zp",
           "int8[1x16]*bf16", "e4m3[tensor]*f32", "nvfp4", "nvfp4_2d", "e4m3[8x128]*f32",
           "f32")  # fmt: skip
APPENDABLE = ("e4m3[row]*f32", "int8[row]*f32+zp", "mxfp6", "mxfp4", "int4[1x128]*f32",
              "int4[1x32]*f32+zp", "f32")  # fmt: skip


def made(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-0.5, 0.5, shape[-1])).to(DEVICE)


def stored(x: Tensor, name: str) -> tuple[list[Tensor], Tensor, ScaledFormat | None]:
    if name == "f32":
        return [x], x, None
    fmt = parse(name)
    parts = quantize_parts(x, fmt)
    return parts, dequantize_parts(parts, fmt, x.shape), fmt


def reference(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor,
              masking: Masking | None = None) -> Tensor:
    """In float64, one query at a time."""
    masking = masking or Masking()
    out = torch.zeros(q.shape, dtype=torch.float64)
    batch, heads, count, depth = q.shape
    scale = depth**-0.5 if masking.scale is None else masking.scale
    for b in range(batch):
        for h in range(heads):
            k, v = (x[b, h * x.shape[1] // heads].double().cpu() for x in (keys, values))
            for t in range(count):
                last = int(lengths[b]) - count + t
                first = max(last + 1 - masking.window, 0) if masking.window else 0
                if last < first:
                    continue
                scores = k[first:last + 1] @ q[b, h, t].double().cpu() * scale
                if masking.cap:
                    scores = masking.cap * torch.tanh(scores / masking.cap)
                out[b, h, t] = scores.softmax(0) @ v[first:last + 1]
    return out.to(q.device)


def assert_near(got: Tensor, want: Tensor, values: Tensor, bound: float = BOUND) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).abs().max() <= bound * values[values.isfinite()].abs().max()


@pytest.mark.parametrize(("name", "depth"), [*((name, 80) for name in FORMATS), ("mxfp8", 64),
                                            ("int4[1x128]*f32", 64), ("mxfp6", 16)])
def test_formats(name, depth):
    keys, k, fmt = stored(made(2, 2, 75, depth), name)
    values, v, _ = stored(made(2, 2, 75, depth, seed=1), name)
    lengths = torch.tensor([75, 68], dtype=torch.int32, device=DEVICE)
    q = made(2, 6, 1, depth, seed=2)
    assert_near(attend(q, keys, values, lengths, (fmt, fmt), splits=2),
                reference(q, k, v, lengths), v)


def test_keys_and_values_in_different_formats():
    keys, k, key_format = stored(made(1, 1, 40, 128), "e4m3[row]*f32")
    values, v, value_format = stored(made(1, 1, 40, 128, seed=1), "int4[1x32]*f32+zp")
    lengths = torch.tensor([40], dtype=torch.int32, device=DEVICE)
    q = made(1, 4, 2, 128, seed=2)
    got = attend(q, keys, values, lengths, (key_format, value_format))
    assert_near(got, reference(q, k, v, lengths), v)


@pytest.mark.parametrize("masking", [
    Masking(), Masking(scale=0.5, window=5), Masking(scale=0.01, cap=30.0),
    Masking(window=70, cap=2.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
def test_lengths_windows_and_caps(count, masking):
    keys, k, fmt = stored(made(5, 2, 130, 32), "mxfp8")
    values, v, _ = stored(made(5, 2, 130, 32, seed=1), "mxfp8")
    lengths = torch.tensor([0, 1, 64, 130, 77], dtype=torch.int32, device=DEVICE)
    q = made(5, 4, count, 32, seed=2)
    got = attend(q, keys, values, lengths, (fmt, fmt), masking)
    assert_near(got, reference(q, k, v, lengths, masking), v)
    assert not got[0].any()


def test_more_queries_than_a_program_takes():
    keys, k, fmt = stored(made(1, 1, 70, 16), "e4m3[row]*f32")
    lengths = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    q = made(1, 9, 16, 16, seed=2)
    got = attend(q, keys, keys, lengths, (fmt, fmt))
    assert_near(got, reference(q, k, k, lengths), k)


@pytest.mark.parametrize("splits", [3, 32])
def test_shares_agree(splits):
    keys, v, fmt = stored(made(2, 1, 135, 32), "mxfp8")
    lengths = torch.tensor([135, 65], dtype=torch.int32, device=DEVICE)
    q = made(2, 4, 1, 32, seed=2)
    whole = attend(q, keys, keys, lengths, (fmt, fmt), splits=1)
    got = attend(q, keys, keys, lengths, (fmt, fmt), splits=splits)
    assert_near(got, whole.double(), v)
    assert torch.equal(got, attend(q, keys, keys, lengths, (fmt, fmt), splits=splits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrower_queries_and_caches(dtype):
    k, v = made(2, 1, 40, 32).to(dtype), made(2, 1, 40, 32, seed=1).to(dtype)
    lengths = torch.tensor([40, 9], dtype=torch.int32, device=DEVICE)
    q = made(2, 4, 1, 32, seed=2).to(dtype)
    got = attend(q, [k], [v], lengths, (None, None))
    assert got.dtype == dtype
    want = reference(q, k, v, lengths)
    if DEVICE == "cpu":  # computed in float32, rounded once
        assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
    else:
        assert_near(got, want, v, 0.02)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["e4m3[row]*f32", "mxfp8", "f32"])
def test_nan_stays_with_its_head_and_where_nobody_looks(name, which):
    both = [made(2, 2, 40, 32), made(2, 2, 40, 32, seed=1)]
    clean, _, fmt = stored(both[1 - which], name)
    lengths = torch.tensor([20, 40], dtype=torch.int32, device=DEVICE)
    q = made(2, 4, 1, 32, seed=2)
    got, without = (
        attend(q, *((parts, clean) if which == 0 else (clean, parts)), lengths, (fmt, fmt))
        for parts in (stored(with_nan(both[which]), name)[0], stored(both[which], name)[0]))
    assert got[1, 2:].isnan().any(-1).all()
    assert not got[0].isnan().any() and not got[1, :2].isnan().any()
    assert torch.equal(got[0], without[0]) and torch.equal(got[1, :2], without[1, :2])


def with_nan(x: Tensor) -> Tensor:
    """NaN within a head's positions, and beyond the end of a sequence."""
    x = x.clone()
    x[1, 1, 7, 3] = x[0, 0, 20:] = torch.nan
    return x


@pytest.mark.parametrize("name", APPENDABLE)
def test_appended_rows_are_those_of_the_whole(name):
    x, y = made(2, 2, 9, 64), made(2, 2, 9, 64, seed=1)
    fmt = None if name == "f32" else parse(name)
    cache = KVCache.empty((2, 2, 12, 64), (fmt, fmt), torch.float32, DEVICE)
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        cache.append(x[:, :, start:stop], y[:, :, start:stop])
    for tensor, parts in ((x, cache.keys), (y, cache.values)):
        for part, want in zip(parts, stored(tensor, name)[0], strict=True):
            assert torch.equal(part[:, :, :9].contiguous().view(torch.uint8),
                               want.view(torch.uint8))
    assert cache.lengths.tolist() == [9, 9]
    q = made(2, 4, 3, 64, seed=2)
    want = reference(q, stored(x, name)[1], stored(y, name)[1], cache.lengths)
    assert_near(cache.attend(q), want, y, 2 * BOUND)


def test_sequences_of_different_lengths_grow():
    x = made(2, 1, 8, 32)
    cache = KVCache.empty((2, 1, 12, 32), (None, None), torch.float32, DEVICE)
    cache.append(x, x)
    cache.lengths.copy_(torch.tensor([8, 3]))
    cache.append(x[:, :, :2], x[:, :, :2])
    want = x[1, 0][[0, 1, 2, 0, 1]]
    assert cache.lengths.tolist() == [10, 5] and torch.equal(cache.keys[0][1, 0, :5], want)


@pytest.mark.parametrize("name", ["e4m3[tensor]*f32", "nvfp4", "e4m3[8x128]*f32",
                                  "int4[1x48]*f32+zp", "nf4"])
def test_what_cannot_be_appended(name):
    with pytest.raises(FormatError, match=r"append|zero points|kernel"):
        cache = KVCache.empty((1, 1, 4, 64), (parse(name), None), torch.float32)
        cache.append(torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 1, 64))


def test_a_full_cache_says_so():
    cache = KVCache.empty((1, 1, 2, 32), (None, None), torch.float32)
    with pytest.raises(FormatError, match="holds 2"):
        cache.append(torch.zeros(1, 1, 3, 32), torch.zeros(1, 1, 3, 32))
    with pytest.raises(FormatError, match="new keys or values"):
        cache.append(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32))


@pytest.mark.parametrize(("change", "said"), [
    ({"q": torch.zeros(1, 3, 1, 32)}, "divisor"),
    ({"q": torch.zeros(1, 2, 1, 32, dtype=torch.float64)}, "queries"),
    ({"q": torch.zeros(1, 2, 1, 64)}, "stores"), ({"q": torch.zeros(1, 2, 1, 512)}, "at most 256"),
    ({"lengths": torch.zeros(1, dtype=torch.int64)}, "lengths"),
    ({"splits": 33}, "33 splits"),
    ({"formats": (parse("mxfp8"), None)}, "stores"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_refused(change, said):
    cache = [torch.zeros(1, 2, 4, 32)]
    arguments = {"q": torch.zeros(1, 2, 1, 32), "keys": cache, "values": cache,
                 "lengths": torch.zeros(1, dtype=torch.int32), "formats": (None, None), **change}
    with pytest.raises(FormatError, match=said):
        attend(**arguments)


@pytest.mark.parametrize("name", ["int4[1x24]*f32", "nf4", "int8[channel]*f32"])
def test_formats_that_no_kernel_reads(name):
    parts, _, fmt = stored(made(1, 1, 4, 64), name)
    with pytest.raises(FormatError, match="no kernel"):
        attend(made(1, 1, 1, 64).cpu(), parts, parts, torch.zeros(1, dtype=torch.int32),
               (fmt, fmt))


def test_masks_that_make_no_sense():
    with pytest.raises(FormatError, match="0 or more"):
        Masking(window=-1)
