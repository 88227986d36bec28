"""Format names: they parse, print and parse back; unknown ones say what is close."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledFormat, named_formats, parse
from scaleprop.formats.elements import SCALES
from scaleprop.formats.scaled import POWER_RULES, RULES

ELEMENT_NAMES = ["e4m3", "e5m2", "e2m1", "e3m2", "e2m3", "int8", "int4", "int3", "int2", "mxint8",
                 "ternary", "binary", "nf4", "log2u4", "logsqrt2u4", "ue5m3", "ue5m3x", "e1m0",
                 "e4m7", "e8m10"]


@st.composite
def formats(draw):
    """Any format that makes sense, built from its fields' names."""
    item = draw(st.sampled_from(ELEMENT_NAMES))
    block = f"{draw(st.integers(1, 300))}x{draw(st.integers(1, 300))}"
    granularity = draw(st.sampled_from(["tensor", "row", "channel", "1x32", "16x16", block]))
    scale = draw(st.sampled_from(SCALES))
    second = draw(st.booleans()) and granularity != "tensor"
    rules = ["mse", *POWER_RULES]
    if scale != "e8m0":
        rules += ["exact"] if second else ["exact", "absmean"]
    if item == "e2m1" and second:
        rules.append("fouroversix")
    if item == "e2m1" and not second:
        rules.append("rms")
    affine = item in ("int8", "int4", "int3", "int2") and not second and scale != "e8m0"
    zero_point = affine and draw(st.booleans())
    if zero_point:
        rules = ["exact", "mse"]
    rule = draw(st.sampled_from(["", *rules]))
    if rule == "" and second and item in ("ternary", "binary") and scale != "e8m0":
        rule = "exact"
    name = f"{item}[{granularity}]*{scale}" + "*f32" * second + "+zp" * zero_point
    return parse(f"{name}:{rule}" if rule else name)


@given(formats())
@settings(max_examples=400, deadline=None)
def test_names_print_and_parse_back(fmt: ScaledFormat):
    assert parse(str(fmt)) == fmt
    assert parse(fmt.long_name) == fmt
    assert str(parse(str(fmt))) == str(fmt)


@pytest.mark.parametrize("name", list(named_formats()))
def test_short_names_are_canonical(name):
    fmt = parse(name)
    assert str(fmt) == name and parse(fmt.long_name) == fmt and named_formats()[name] == fmt


def test_what_the_short_names_mean():
    meaning = {"mxfp8": "e4m3[1x32]*e8m0:floor", "mxfp4": "e2m1[1x32]*e8m0:floor",
               "mxfp6": "e2m3[1x32]*e8m0:floor", "nvfp4": "e2m1[1x16]*e4m3*f32:exact",
               "int8": "int8[tensor]*f32:exact", "fp8": "e4m3[tensor]*f32:exact"}
    for short, long in meaning.items():
        assert parse(short).long_name == long
    assert str(parse("mxfp8:rceil")) == "mxfp8:rceil" and parse("mxfp8:floor") == parse("mxfp8")
    assert str(parse("e4m3[1x32]*e8m0")) == "mxfp8"
    assert str(parse("int8+zp")) == "int8+zp" and parse("int8+zp").zero_point
    assert parse("nvfp4:4over6").rule == "fouroversix"
    fmt = parse("e2m1[16x16]*ue5m3*f32")
    assert fmt.block == (16, 16) and fmt.two_level and fmt.parts_count == 3
    assert parse(fmt) is fmt and parse("int8[1x32]*f16").block == (1, 32)


@pytest.mark.parametrize("name, message", [
    ("mxfp5", "did you mean mxfp"),
    ("nvpf4", "did you mean nvfp4"),
    ("e4m3[1x32]*e9m9", "unknown scale format 'e9m9'"),
    ("e9m3[1x32]*f32", "unknown element format 'e9m3'"),
    ("e4m3[block]*f32", r"granularity \[block\]"),
    ("e4m3[0x32]*f32", r"granularity \[0x32\]"),
    ("mxfp8:best", "unknown scale rule 'best'; known: floor"),
    ("mxfp8:exact", "holds powers of two"),
    ("fp8+zp", "take a zero point"),
    ("nvfp4+zp", "take a zero point"),
    ("int8[1x32]*e8m0+zp", "one float scale"),
    ("int8[tensor]*f32+zp:floor", "one float scale"),
    ("mxfp8:fouroversix", "fouroversix is for e2m1"),
    ("mxfp8:rms", "rms is for e2m1"),
    ("nvfp4:rms", "scales of one level"),
    ("e4m3[tensor]*f32*f32", "drop the tensor scale"),
    ("e2m1[1x16]*e4m3*f16", "the tensor scale is f32"),
    ("f32[tensor]*f32", "not a quantized element"),
    ("ternary[1x16]*f16*f32", "absmean has one level"),
    ("", "unknown format"),
])
def test_bad_names_say_what_to_do(name, message):
    with pytest.raises(FormatError, match=message):
        parse(name)


def test_only_names_and_formats_parse():
    with pytest.raises(FormatError, match="not int"):
        parse(8)


def test_every_rule_is_documented():
    assert set(POWER_RULES) < set(RULES) and all(RULES.values())
