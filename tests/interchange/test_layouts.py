"""Codes and scales in compressed-tensors' layouts: its compressors are the oracle, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledTensor, parse, quantize
from scaleprop.interchange import layouts, schemes
from tests.interchange.tiny import same_bits

# weight, activation; products in the type of the scales are exact, but for those in NARROW
PAIRS = [
    ("int8[tensor]*f32", "int8[tensor]*f32"),
    ("int8[row]*f32", "int8[row]*f32"),
    ("int8[row]*f32", None),
    ("int8[row]*f32+zp", "int8[tensor]*f32+zp"),
    ("int8[row]*f32+zp", None),
    ("int4[1x32]*f32", None),
    ("int4[1x32]*f32+zp", None),
    ("int4[1x128]*f32", "int8[row]*f32"),
    ("int4[1x128]*f32+zp", None),
    ("int4[row]*f32+zp", None),
    ("int4[1x32]*f32+zp", "int8[1x32]*f32"),
    ("int3[1x32]*f32+zp", None),
    ("int2[1x64]*f32", None),
    ("e4m3[tensor]*f32", "e4m3[tensor]*f32"),
    ("e4m3[row]*f32", "e4m3[row]*f32"),
    ("e4m3[row]*f32", None),
    ("e4m3[1x128]*f32", "e4m3[1x128]*f32"),
    ("e4m3[128x128]*f32", "e4m3[1x128]*f32"),
    ("mxfp8", "mxfp8"),
    ("mxfp6", None),
    ("mxfp4", "mxfp4:even"),
    ("mxfp4", None),
    ("nvfp4", None),
    ("int4[1x32]*bf16", None),
    ("int4[1x32]*f16+zp", None),
]
NARROW = {"nvfp4", "int4[1x32]*bf16", "int4[1x32]*f16+zp"}  # products rounded to bfloat16, float16


def weight(fmt: str, rows: int = 40, columns: int = 256) -> ScaledTensor:
    torch.manual_seed(len(fmt))
    return quantize(torch.randn(rows, columns) * torch.rand(rows, 1), fmt)


def scheme(tensor: ScaledTensor, activation: str | None) -> tuple[QuantizationScheme, str]:
    args = schemes.weight_args(tensor.format)
    inputs = None if activation is None else schemes.activation_args(parse(activation), "dynamic")
    name = schemes.compression(args, inputs)
    described = {"targets": ["Linear"], "weights": args, "input_activations": inputs}
    return QuantizationScheme.model_validate(described), name


def decompressed(parts: dict[str, torch.Tensor], found: QuantizationScheme, name: str) -> Any:
    return BaseCompressor.get_value_from_registry(name).decompress(parts, found)["weight"]


@pytest.mark.parametrize(("fmt", "activation"), PAIRS)
def test_its_decompressor_gives_our_numbers(fmt: str, activation: str | None):
    tensor = weight(fmt)
    found, name = scheme(tensor, activation)
    assert infer_module_format(torch.nn.Linear, found).value == name
    actual = decompressed(layouts.written(tensor, name), found, name).double()
    exact = tensor.dequantize(torch.float64)
    if fmt not in NARROW:
        assert torch.equal(actual, tensor.dequantize().double())
    else:  # two roundings to 8 significant bits (float16: 11)
        assert ((actual - exact).abs() <= exact.abs() * 2.0**-7).all()
        assert not torch.equal(actual, exact)


@pytest.mark.parametrize(
    ("fmt", "activation"), [pair for pair in PAIRS if pair[0] not in NARROW])
def test_its_compressor_makes_our_codes(fmt: str, activation: str | None):
    first = weight(fmt)
    # its FP4 has no negative zero
    tensor = quantize(first.dequantize() + 0.0, fmt, scales=first.parts[1:])
    found, name = scheme(tensor, activation)
    ours = layouts.written(tensor, name)
    given: dict[str, torch.Tensor] = {"weight": tensor.dequantize()}
    scale = tensor.scale.to(torch.float32)
    given["weight_scale"] = scale.reshape(1) if scale.ndim == 0 else scale
    if tensor.zero_point is not None:
        shifted = tensor.zero_point.to(torch.int16) - (1 << (tensor.format.bits - 1))
        given["weight_zero_point"] = shifted.to(torch.int8)
    theirs = BaseCompressor.get_value_from_registry(name).compress(given, found)
    assert same_bits(theirs, ours)


@pytest.mark.parametrize(("fmt", "activation"), PAIRS)
def test_what_is_read_is_what_was_written(fmt: str, activation: str | None):
    tensor = weight(fmt)
    args = schemes.weight_args(tensor.format)
    inputs = None if activation is None else schemes.activation_args(parse(activation), "dynamic")
    name = schemes.compression(args, inputs)
    parts = layouts.written(tensor, name)
    again = layouts.read(parts, args, name)
    assert again.format == tensor.format.replace(rule=again.format.rule)
    assert torch.equal(again.codes(), tensor.codes())
    assert same_bits(layouts.written(again, name), parts)
    if fmt != "nvfp4":
        assert same_bits(dict(enumerate(again.parts)), dict(enumerate(tensor.parts)))  # type: ignore[arg-type]


def test_global_scales_written_again_are_the_same():
    # every significand: rounding depends on nothing else
    mantissas = torch.arange(0, 1 << 23, 5, dtype=torch.int32)
    scales = (mantissas + (118 << 23)).view(torch.float32)
    stored = scales.reciprocal()
    again = stored.reciprocal()
    assert torch.equal(again.reciprocal(), stored)
    assert ((again - scales).abs() <= scales * 2.0**-23).all()


def test_activations_that_are_static():
    static = schemes.activation_args(parse("int8[tensor]*f32+zp"), "static")
    assert (static["dynamic"], static["symmetric"], static["strategy"]) == (False, False, "tensor")
    assert schemes.activation_role(static).scaling == "static"
    local = schemes.activation_args(parse("nvfp4"), "static")
    assert (local["dynamic"], local["group_size"]) == ("local", 16)
    assert schemes.activation_role(local).scaling == "static"


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        ("fp8_e5m2", "elements are e5m2"),
        ("nf4", "elements are nf4"),
        ("mxint8", "elements are mxint8"),
        ("mxfp6_e3m2", "elements are e3m2"),
        ("int4[1x32]*e8m0", "e8m0 scales are known of"),
        ("int4[1x128]*e4m3*f32", "nvfp4 alone"),
        ("nvfp4_2d", "nvfp4 alone"),
        ("e2m1[1x64]*e8m0", "e8m0 scales are known of"),
        ("int8[16x16]*f32", r"scales per \[16x16\] of int8"),
        ("e4m3[1x32]*f32", "blocks of 32"),
        ("int4[1x32]*e4m3", "its scales are e4m3"),
    ],
)
def test_formats_without_words(fmt: str, why: str):
    with pytest.raises(FormatError, match=why):
        schemes.weight_args(parse(fmt))


def test_columns_that_are_no_whole_blocks():
    tensor = weight("int4[1x128]*f32", columns=192)
    with pytest.raises(FormatError, match="192 columns are no whole blocks of 128"):
        layouts.written(tensor, schemes.PACKED)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda parts: parts.pop("weight_scale"), "weight_scale is missing"),
        (lambda parts: parts.update(weight_packed=parts["weight_packed"][:, 1:]), "hold no 256"),
        (lambda parts: parts.update(weight_packed=parts["weight_packed"].long()), "int32"),
        (lambda parts: parts.update(weight_scale=parts["weight_scale"][:, :1]), "scale is"),
        (lambda parts: parts.update(weight_shape=torch.tensor([40])), "weight_shape"),
    ],
)
def test_damaged_tensors_are_refused(change: Any, why: str):
    tensor = weight("int4[1x32]*f32")
    args = schemes.weight_args(tensor.format)
    parts = layouts.written(tensor, schemes.PACKED)
    change(parts)
    with pytest.raises(FormatError, match=why):
        layouts.read(parts, args, schemes.PACKED)
