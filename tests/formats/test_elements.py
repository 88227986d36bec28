"""Every code of every element format, against the scalar reference, ml_dtypes and gfloat."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from format_support import (
    ALL,
    FLOATS,
    SMALL,
    all_bfloat16,
    gfloat_format,
    grid,
    same,
    telling_inputs,
)
from gfloat import decode_float

from scaleprop.errors import FormatError
from scaleprop.formats import reference
from scaleprop.formats.elements import ELEMENTS, element, scale_element
from scaleprop.formats.rounding import Rounding, decode, encode, nearest

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn, "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu,
    "int4": ml_dtypes.int4, "int2": ml_dtypes.int2,
}


def codes_tensor(name: str) -> torch.Tensor:
    item = element(name)
    codes = torch.tensor(list(item.codes), dtype=torch.int32)
    if getattr(item, "native", None) is not None:
        return codes.to(torch.uint8).view(item.native)
    if name.startswith(("int", "mxint", "ternary")):
        half = 1 << (item.bits - 1)
        return ((codes ^ half) - half).to(torch.int8)
    return codes


@pytest.mark.parametrize("name", ALL)
def test_decode_equals_the_scalar_reference_on_every_code(name):
    item = element(name)
    expected = torch.tensor([item.decode(code) for code in item.codes], dtype=torch.float32)
    assert same(decode(codes_tensor(name), item), expected)


@pytest.mark.parametrize("name", ALL)
def test_encode_inverts_decode(name):
    item = element(name)
    codes = codes_tensor(name)
    values = decode(codes, item)
    keep = values.isfinite()
    back = encode(values[keep], item)
    assert same(decode(back, item), values[keep])
    if item.bits > 1 and name not in ("e8m0",):
        raw = codes.view(torch.uint8) if codes.dtype.is_floating_point else codes
        again = back.view(torch.uint8) if back.dtype.is_floating_point else back
        assert torch.equal(again.to(torch.int32), raw[keep].to(torch.int32))


@pytest.mark.parametrize("name", [n for n in SMALL if n != "e8m0"])
def test_encode_equals_the_scalar_search(name):
    item = element(name)
    values = grid(item)
    codes = encode(torch.tensor(values, dtype=torch.float32), item)
    codes = codes.view(torch.uint8) if codes.dtype.is_floating_point else codes
    found = [int(code) % (1 << item.bits) for code in codes]
    assert found == [reference.encode_value(value, item) for value in values]


@pytest.mark.parametrize("name", list(ML_DTYPES))
def test_every_code_decodes_as_in_ml_dtypes(name):
    item = element(name)
    ours = np.array([item.decode(code) for code in item.codes], dtype=np.float32)
    codes = np.arange(len(item.codes), dtype=np.uint8)
    if name.startswith("int"):
        half = len(codes) // 2
        theirs = ((codes.astype(np.int32) ^ half) - half).astype(ML_DTYPES[name]).astype(np.float32)
    else:
        theirs = codes.view(ML_DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_rounding_equals_ml_dtypes_on_all_bfloat16_and_at_every_edge(name):
    item = element(name)
    x = torch.cat([all_bfloat16(), telling_inputs(item)])
    clipped = x.numpy().clip(item.min, item.max)  # ml_dtypes' E4M3 overflows to NaN, ours saturates
    theirs = clipped.astype(ML_DTYPES[name])
    assert same(nearest(x, item), torch.from_numpy(theirs.astype(np.float32)))
    codes = encode(nearest(x, item), item)
    codes = codes.view(torch.uint8) if codes.dtype.is_floating_point else codes
    np.testing.assert_array_equal(codes.numpy(), theirs.view(np.uint8))


def test_e8m0_rounds_as_torch_and_ml_dtypes_halves_up():
    item = element("e8m0")
    x = all_bfloat16()
    x = torch.cat([x[x > 0], torch.tensor([3.0, 1.5, 0.75, 2.0**-127, 2.0**-128])])
    # between 2^-127 and 2^-126 both round everything up; we stay nearest there
    x = x[(x <= 2.0**127) & ((x >= 2.0**-126) | (x <= 2.0**-127))]
    expected = x.to(torch.float8_e8m0fnu).float()
    assert same(nearest(x, item), expected)
    theirs = x.clamp(min=2.0**-127).numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert same(nearest(x, item), torch.from_numpy(theirs))


def test_e8m0_has_neither_zero_nor_sign_and_keeps_nan():
    x = torch.tensor([0.0, -0.0, -4.0, math.nan, 1e38 * 3, math.inf])
    codes = encode(nearest(x, element("e8m0")), element("e8m0")).view(torch.uint8)
    assert codes.tolist() == [0, 0, 0, 255, 254, 254]


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_decodes_as_in_gfloat(name):
    item = element(name)
    if not item.has_zero or item.exponent_bits == 1 or name == "e5m0":
        pytest.skip("gfloat cannot describe it")
    info = gfloat_format(item)
    stride = max(len(item.codes) // 4096, 1)
    for code in item.codes[::stride]:
        ours, theirs = item.decode(code), decode_float(info, code).fval
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs)), code


@pytest.mark.parametrize("name", ALL)
def test_nearest_equals_the_scalar_reference_at_every_edge(name):
    item = element(name)
    x = telling_inputs(item, limit=400)
    expected = torch.tensor([reference.round_value(float(v), item) for v in x], dtype=torch.float32)
    got = nearest(x, item)
    if item.min < 0:
        assert same(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ALL)
def test_nearest_in_float64_rounds_once(name):
    item = element(name)
    narrow = telling_inputs(item, limit=100)
    wide = narrow.double()
    x = torch.cat([wide, wide * (1 + 2.0**-40), wide * (1 - 2.0**-40)])
    got = nearest(x, item)
    assert got.dtype == torch.float64
    expected = torch.tensor([reference.round_value(float(v), item) for v in x], dtype=torch.float64)
    assert torch.equal(got, expected)
    assert torch.equal(nearest(narrow, item).double(), got[: len(narrow)])


@pytest.mark.parametrize("name", ALL)
def test_saturation_nan_and_infinity(name):
    item = element(name)
    got = nearest(torch.tensor([math.inf, -math.inf, math.nan]), item)
    assert got[0] == item.max and got[1] == item.min and got[2].isnan()
    code = encode(got[2:], item)
    decoded = decode(code, item)
    if getattr(item, "nan_code", None) is not None:
        assert decoded.isnan().all()
    elif 0.0 in grid(item):
        assert (decoded == 0).all()


def test_published_constants():
    # OFP8 1.0 tables 1 and 2; MX 1.0 tables 3 to 6; UE5M3 with both published maxima
    expected = {"e4m3": (448.0, 2.0**-6, 2.0**-9), "e5m2": (57344.0, 2.0**-14, 2.0**-16),
                "e3m2": (28.0, 0.25, 0.0625), "e2m3": (7.5, 1.0, 0.125), "e2m1": (6.0, 1.0, 0.5),
                "ue5m3": (61440.0, 2.0**-14, 2.0**-17), "ue5m3x": (114688.0, 2.0**-14, 2.0**-17),
                "f16": (65504.0, 2.0**-14, 2.0**-24)}
    for name, (largest, normal, smallest) in expected.items():
        item = ELEMENTS[name]
        assert (item.max, 2.0**item.emin, item.smallest) == (largest, normal, smallest), name
    assert element("e2m1").max == 6 and grid(element("e2m1"))[-8:] == [0, .5, 1, 1.5, 2, 3, 4, 6]
    assert (element("e8m0").min, element("e8m0").max) == (2.0**-127, 2.0**127)
    assert element("mxint8").max == 1.984375 and element("mxint8").min == -1.984375
    assert element("int3").max == 3 and element("int2").max == 1


@pytest.mark.parametrize("dtype, name", [(torch.float16, "e5m10"), (torch.bfloat16, "e8m7")])
def test_wide_generic_formats_are_the_ieee_ones(dtype, name):
    item = element(name)
    x = torch.cat([all_bfloat16()[::7], telling_inputs(item, limit=2000)])
    expected = x.clamp(item.min, item.max).to(dtype).float()
    assert same(nearest(x, item), expected)
    assert item.max == torch.finfo(dtype).max


def test_log_codebooks_round_in_the_logarithm():
    x = torch.rand(5000).clamp(min=1e-4)
    log2 = nearest(x, element("log2u4"))
    assert torch.equal(log2, torch.exp2(-torch.round(-torch.log2(x)).clamp(0, 15)))
    root = nearest(x, element("logsqrt2u4"))
    expected = torch.exp2(-torch.round(-2 * torch.log2(x)).clamp(0, 15) / 2)
    torch.testing.assert_close(root, expected)


@pytest.mark.parametrize("name", ["e9m2", "e4m11", "float8", "", "E4M3"])
def test_unknown_element_names_are_refused(name):
    with pytest.raises(FormatError, match="unknown element format"):
        element(name)


def test_unknown_scale_names_are_refused_with_those_that_exist():
    with pytest.raises(FormatError, match="e8m0, e4m3, ue5m3"):
        scale_element("e3m4")


def test_codebooks_are_checked():
    from scaleprop.formats.elements import CodebookElement
    with pytest.raises(FormatError, match="ascending"):
        CodebookElement(name="bad", values=(1.0, 0.0))


def test_rounding_names():
    from scaleprop.formats.rounding import parse_rounding
    assert parse_rounding("stochastic_fast:16") == Rounding("stochastic_fast", 16)
    assert parse_rounding("stochastic").bits == 8
    for name in ("up", "nearest:3", "stochastic:0", "stochastic:23", "stochastic:x"):
        with pytest.raises(FormatError, match="unknown rounding"):
            parse_rounding(name)
