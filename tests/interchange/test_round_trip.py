"""Written, read, written again: the same bits; and loaded by transformers: the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as their_fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from scaleprop.api import CompiledModel
from scaleprop.backends.registry import backend_named
from scaleprop.formats import fake_quantize, parse
from scaleprop.interchange import layouts, schemes
from scaleprop.interchange.programs import quantized_weights, with_high_activations
from scaleprop.interchange.reading import read_checkpoint
from scaleprop.passes.base import Program
from scaleprop.recipes import Recipe
from tests.interchange.tiny import (
    IDS,
    compiled,
    config,
    recipe,
    recompiled,
    same_bits,
    tensors,
)

# Norms of differences. Where scales are stored, both round the same numbers; where they are found
# at run time, a rounding in float32 before may flip codes, and INT8's scale is amax/127 here and
# amax/127.5 there. DECODED: transformers decodes at load, and leaves activations as they are.
EXACT, FLIPS, OTHER_SCALE = 1e-6, 0.03, 0.03
DECODED = "decoded"
CASES: dict[str, tuple[Recipe, Any]] = {
    "int8-static": (recipe("int8[row]*f32", "int8[tensor]*f32+zp", static=True), EXACT),
    "int8-static-symmetric": (recipe("int8[row]*f32", "int8[tensor]*f32", static=True), EXACT),
    "int8-token": (recipe("int8[row]*f32", "int8[row]*f32"), OTHER_SCALE),
    "int8-weight": (recipe("int8[row]*f32"), EXACT),
    "int4-32": (recipe("int4[1x32]*f32"), EXACT),
    "int4-128": (recipe("int4[1x128]*f32"), EXACT),
    "int4-32-asymmetric": (recipe("int4[1x32]*f32+zp"), DECODED),
    "int4-128-asymmetric": (recipe("int4[1x128]*f32+zp"), DECODED),
    "int4-int8": (recipe("int4[1x128]*f32+zp", "int8[row]*f32"), OTHER_SCALE),
    "fp8-static": (recipe("e4m3[tensor]*f32", "e4m3[tensor]*f32", static=True), FLIPS),
    "fp8-channel": (recipe("e4m3[row]*f32", "e4m3[row]*f32"), FLIPS),
    "fp8-block": (recipe("e4m3[128x128]*f32", "e4m3[1x128]*f32"), FLIPS),
    "fp8-weight": (recipe("e4m3[row]*f32"), EXACT),
    "mxfp8": (recipe("mxfp8:rceil", "mxfp8:rceil"), DECODED),
    "mxfp4": (recipe("mxfp4:even", "mxfp4:even"), DECODED),
    "mxfp4-weight": (recipe("mxfp4"), DECODED),
    "nvfp4": (recipe("nvfp4", "nvfp4", static=True), DECODED),
    "nvfp4-weight": (recipe("nvfp4:mse"), DECODED),
}


@pytest.mark.parametrize("name", CASES)
def test_written_twice(name: str, model: Any, program: Program, tmp_path: Path):
    chosen, bound = CASES[name]
    first = compiled(program, chosen)
    first.save_pretrained(tmp_path / "1", model, check=False)
    second = recompiled(program, read_checkpoint(tmp_path / "1"))
    second.save_pretrained(tmp_path / "2", model, check=False)
    assert same_bits(tensors(tmp_path / "1"), tensors(tmp_path / "2"))
    assert config(tmp_path / "1") == config(tmp_path / "2")
    stored, again = (dict(quantized_weights(item.program)) for item in (first, second))
    assert stored.keys() == again.keys()
    for key, weight in stored.items():
        assert torch.equal(weight.tensor.codes(), again[key].tensor.codes())
    described = config(tmp_path / "1")["quantization_config"]
    assert QuantizationConfig.model_validate(described).format == described["format"]
    _check_loaded(tmp_path / "1", first, bound)


def _check_loaded(folder: Path, ours: CompiledModel, bound: Any) -> None:
    given = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if bound == DECODED \
        else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    with torch.no_grad():
        actual = loaded(input_ids=IDS).logits
    expected = ours.program
    if bound == DECODED:
        expected = with_high_activations(expected)
    (wanted,) = backend_named("reference").lower(expected)([IDS])
    is_nvfp4 = any(weight.tensor.format.two_level for _, weight in quantized_weights(expected))
    for name, weight in quantized_weights(expected):
        exact = weight.tensor.dequantize()
        found = loaded.get_parameter(name).detach()
        if is_nvfp4:  # its product is rounded to bfloat16
            assert ((found - exact).abs() <= exact.abs() * 2.0**-8).all()
        else:
            assert torch.equal(found, exact)
    limit = 0.01 if is_nvfp4 else EXACT if bound == DECODED else bound
    assert float((actual - wanted).norm() / wanted.norm()) < limit


def _theirs(x: torch.Tensor, args: dict[str, Any], stored: torch.Tensor | None) -> torch.Tensor:
    """What compressed-tensors' forward does to a linear's input, with scales found at run time."""
    described = QuantizationArgs.model_validate(args)
    scale, zero = compute_dynamic_scales_and_zp(x, described, nn.Linear(1, 1), global_scale=stored)
    return their_fake_quantize(x, scale, zero, described, global_scale=stored)


@pytest.mark.parametrize("fmt", ["e4m3[row]*f32", "e4m3[tensor]*f32", "e4m3[1x128]*f32",
                                 "mxfp4:even", "mxfp8:rceil", "mxfp6:even", "int8[tensor]*f32+zp"])
def test_scales_found_at_run_time(fmt: str):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 128) * torch.rand(128)
    args = schemes.activation_args(parse(fmt), "dynamic")
    ours = fake_quantize(x, schemes.activation_role(args).format)
    assert torch.allclose(_theirs(x, args, None), ours, rtol=1e-6, atol=1e-7)


def test_nvfp4_activations_with_a_stored_scale():
    """Apart only where the two orders of operations round apart."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    stored = layouts.global_scale(torch.tensor(3.1 / (448 * 6)))
    args = schemes.activation_args(parse("nvfp4"), "static")
    ours = fake_quantize(x, "nvfp4", scales=[layouts.tensor_scale(stored)])
    apart = (ours - _theirs(x, args, stored)).abs() > 1e-5
    assert apart.double().mean() < 0.01
