"""``from_pretrained(…, quantization_config=ScalepropConfig(…))`` against ``scaleprop.compile``."""

from __future__ import annotations

import copy
import gc
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import parse
from scaleprop.recipes import Recipe, Role, named_recipe, named_recipes

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

from scaleprop.adapters.modules import Plan, ScaledWeight, plan_for, scale_module  # noqa: E402
from scaleprop.adapters.pretrained import ScalepropConfig  # noqa: E402

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2}
IDS = torch.arange(14).view(2, 7) * 5 % 96
CAUSAL = {"input_ids": IDS, "use_cache": False}
HEAD, TABLE = "lm_head", "model.embed_tokens"


def causal(tied: bool) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied": (lambda: causal(True), CAUSAL),
    "untied": (lambda: causal(False), CAUSAL),
    "encoder": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
                {"input_ids": IDS, "token_type_ids": IDS % 2,
                 "attention_mask": torch.ones_like(IDS)}),
    "columns": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16)), CAUSAL),
    "scaled-table": (lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        **SIZES, num_key_value_heads=1, head_dim=16)), CAUSAL),
    "convolutions": (lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()}),
}


class Saved:
    """A float model, and the folder that it was saved to."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        make, self.inputs = MODELS[name]
        self.model = make().eval()
        self.folder = folder
        self._compiled: dict[str, Any] = {}
        self.model.save_pretrained(folder)

    def load(self, recipe: Any, folder: Path | None = None, **kwargs: Any) -> Any:
        config = recipe if isinstance(recipe, ScalepropConfig) else ScalepropConfig(recipe)
        return type(self.model).from_pretrained(folder or self.folder, quantization_config=config,
                                                **kwargs)

    def reload(self, folder: Path) -> tuple[Any, dict[str, Any]]:
        return type(self.model).from_pretrained(folder, output_loading_info=True)

    def compile(self, recipe: str) -> Any:
        if recipe not in self._compiled:
            self._compiled[recipe] = scaleprop.compile(self.model, self.inputs, recipe,
                                                       backend="reference")
        return self._compiled[recipe]

    def run(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.inputs)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            made[name] = Saved(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def scaled(model: nn.Module) -> dict[str, ScaledWeight]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, ScaledWeight)}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same_parts(left: nn.Module, right: nn.Module) -> bool:
    pairs = [(one.parts, scaled(right)[name].parts) for name, one in scaled(left).items()]
    return scaled(left).keys() == scaled(right).keys() and all(
        as_bytes(a) == as_bytes(b) for one, other in pairs for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("name", "recipe"), [
    ("tied", "int8-token"), ("untied", "mxfp4"), ("encoder", "nvfp4"), ("columns", "mxfp4"),
    ("scaled-table", "mxfp8"), ("convolutions", "int8-dynamic")])
def test_outputs_are_those_of_the_reference(
    name: str, recipe: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved(name)
    model, compiled = source.load(recipe), source.compile(recipe)
    found = source.run(model)
    assert torch.equal(found, compiled(**source.inputs)[0])
    assert not torch.equal(found, source.run(source.model))

    # a table that is tied with a head goes by the head's name in the graph, and both by one record
    named = {record.operand.removesuffix("_t"): record for record in compiled.report.records
             if record.role in ("fprop.w", "embedding") and record.nbytes is not None}
    mine = {f"{path}.weight": module for path, module in scaled(model).items()}
    stored = {path for path, record in named.items() if record.format is not None}
    assert stored <= mine.keys()
    tied = model.get_output_embeddings() is not None
    assert set(mine) - stored <= ({f"{TABLE}.weight", "transformer.wte.weight"} if tied else set())
    for path in stored - {f"{HEAD}.weight"}:
        assert mine[path].weight_plan.format == named[path].format
        assert sum(part.nbytes for part in mine[path].parts) == named[path].nbytes

    assert model.get_memory_footprint() < 0.5 * source.model.get_memory_footprint()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["schema_version"]) == ("scaleprop", 1)
    again, info = source.reload(tmp_path)
    assert not any(info.values()), info
    assert same_parts(model, again)
    assert torch.equal(found, source.run(again))
    assert again.get_memory_footprint() == model.get_memory_footprint()


@pytest.mark.parametrize("recipe", [recipe.name for recipe in named_recipes()])
def test_every_recipe_is_taken_or_refused_with_a_remedy(
    recipe: str, saved: Callable[[str], Saved]
) -> None:
    if named_recipe(recipe).needs_calibration:
        with pytest.raises(ConfigError, match=rf"'{recipe}' needs calibration.*Remedy: .*compile"):
            ScalepropConfig(recipe)
        return
    source = saved("tied")
    model = source.load(recipe)
    roles = named_recipe(recipe).roles
    for path, role in ((f"{TABLE}", roles["embedding"]), (HEAD, roles["fprop.w"])):
        fmt = parse(role.format)
        fmt = fmt.replace(rule="mse") if role.clipping == "mse" else fmt
        expected = scaleprop.fake_quantize(source.model.get_parameter(f"{TABLE}.weight"), fmt)
        assert torch.equal(model.get_submodule(path).weight, expected)
    assert torch.isfinite(source.run(model)).all()


def test_weights_are_quantized_one_by_one(
    saved: Callable[[str], Saved], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved("untied")
    matrices = [p.nbytes for p in source.model.parameters() if p.ndim == 2]
    alive: list[int] = []
    quantized = Plan.quantized
    others = {id(p) for p in gc.get_objects() if issubclass(type(p), torch.Tensor)}

    def watched(self: Plan, weight: torch.Tensor) -> Any:
        tensors = [p for p in gc.get_objects() if issubclass(type(p), torch.Tensor)
                   and id(p) not in others and p.dtype == torch.float32 and p.ndim == 2
                   and not p.is_meta]
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors
                    if p.numel() >= min(matrices) // 4}
        alive.append(sum(storages.values()))
        return quantized(self, weight)

    monkeypatch.setattr(Plan, "quantized", watched)
    source.load("int4-int4")
    assert len(alive) == len(matrices)
    assert 0 < max(alive) <= max(matrices) < 0.5 * sum(matrices)


# --- the config ----------------------------------------------------------------------------------


def test_the_config_survives_json() -> None:
    recipe = named_recipe("fp8").replace(name="mine")
    config = ScalepropConfig(recipe, exclude=["a.*"], include=["b"])
    data = json.loads(config.to_json_string())
    assert data == config.to_dict() == config.to_diff_dict() == dict(config)
    again = ScalepropConfig.from_dict(data)
    assert (again.recipe, again.exclude, again.include) == (recipe, ("a.*",), ("b",))
    assert scaleprop.ScalepropConfig is ScalepropConfig
    assert ScalepropConfig.from_dict({"quant_method": "scaleprop", "recipe": "fp8"}).recipe.roles \
        == recipe.roles


def test_configs_that_make_no_sense_are_named() -> None:
    only_x = Recipe(name="x", description="", roles={"fprop.x": Role(format="mxfp8")})
    random = Recipe(name="r", description="", roles={
        "fprop.w": Role(format="mxfp8", rounding="stochastic")})
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: ScalepropConfig("mxpf4"), "unknown recipe 'mxpf4'; did you mean 'mxfp4'"),
        (lambda: ScalepropConfig("fp8", exclude="lm_head"), "exclude='lm_head': give a list"),
        (lambda: ScalepropConfig("fp8", include=[3]), "include=.*give a list"),  # type: ignore[list-item]
        (lambda: ScalepropConfig("fp8", schema_version=2), "schema_version 2; this version reads"),
        (lambda: ScalepropConfig("fp8", quant_method="fp8"), "is 'fp8'"),
        (lambda: ScalepropConfig.from_dict({"recipe": "fp8", "bits": 4}), "'bits'"),
        (lambda: ScalepropConfig({"name": "x"}), "recipe schema_version None"),
        (lambda: ScalepropConfig(only_x), "quantizes what aten.linear.default reads, and not its"),
        (lambda: ScalepropConfig(random), "'fprop.w' stochastically.*Remedy"),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()


def test_patterns_keep_high_what_compile_would(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved("untied")
    exclude = ["model.layers.0.self_attn.*", "aten.embedding", "lm_head"]
    model = source.load(ScalepropConfig("mxfp8", exclude=exclude))
    compiled = scaleprop.compile(source.model, source.inputs, "mxfp8", "reference",
                                 exclude=exclude)
    assert torch.equal(source.run(model), compiled(**source.inputs)[0])
    assert all(".mlp." in path for path in scaled(model)) and scaled(model)
    model.save_pretrained(tmp_path)
    inner = transformers.AutoModel.from_pretrained(tmp_path)  # its paths do not start by "model."
    assert scaled(inner).keys() == {path.removeprefix("model.") for path in scaled(model)}
    only = source.load(ScalepropConfig("mxfp8", include=["*.mlp"]))
    assert scaled(only).keys() == scaled(model).keys()
    with pytest.raises(ConfigError, match=r"exclude='lm_haed' matches no module.*near: 'lm_head'"):
        source.load(ScalepropConfig("mxfp8", exclude=["lm_haed"]))


# --- what transformers, torch and compile do with such a model -----------------------------------


def test_other_configs_and_disks_are_refused(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved("tied")
    source.load("mxfp4").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized with ScalepropConfig but you are passing"):
        other = transformers.BitsAndBytesConfig(load_in_8bit=True)
        type(source.model).from_pretrained(tmp_path, quantization_config=other)
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
        again = source.load("fp8", tmp_path)
    assert again.hf_quantizer.quantization_config.recipe.name == "mxfp4"
    with pytest.raises(ConfigError, match=r"cannot be on disk\. Remedy: load on the CPU"):
        source.load("mxfp4", device_map={"model": "cpu", "lm_head": "disk"})
    on_cpu = source.load("mxfp4", device_map={"": "cpu"})
    assert same_parts(on_cpu, again)


def test_a_new_head_is_quantized_as_it_was_initialized(saved: Callable[[str], Saved]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        saved("encoder").folder, quantization_config=ScalepropConfig("mxfp4"), num_labels=3)
    assert "classifier" in scaled(model)
    assert model.classifier.weight.abs().sum() > 0
    assert model.classifier.bias.tolist() == [0.0, 0.0, 0.0]


def test_a_new_head_on_codes_is_initialized(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    saved("encoder").load("int8-weight").save_pretrained(tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    weight = scaled(model)["classifier"].weight
    assert 0 < float(weight.abs().max()) < 6 * model.config.initializer_range
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("query.weight_scale"))
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks .*query\.weight_scale.*damaged"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_a_move_that_fails_costs_nothing(saved: Callable[[str], Saved]) -> None:
    source = saved("tied")
    model = source.load("int8-token")
    found = source.run(model)

    def fails(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such device")

    for module in scaled(model).values():
        with pytest.raises(RuntimeError, match="no such device"):
            module._apply(fails)  # pyright: ignore[reportPrivateUsage]
    assert torch.equal(source.run(model), found)


def test_codes_are_not_resized(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    source = saved("untied")
    model = source.load("mxfp4")
    found = source.run(model)
    with pytest.raises(ConfigError, match=r"cannot be resized to .*Remedy: resize the float model"):
        model.resize_token_embeddings(model.config.vocab_size + 8)
    assert torch.equal(source.run(model), found)
    model = source.load(ScalepropConfig("mxfp4", exclude=[TABLE]))
    model.resize_token_embeddings(model.config.vocab_size + 8)  # makes a new head, of floats
    with pytest.raises(ConfigError, match=f"{HEAD} has no codes any more"):
        model.save_pretrained(tmp_path)


def test_weights_that_attention_reads_by_itself_stay() -> None:
    attention = nn.MultiheadAttention(32, 2)
    assert plan_for(attention.out_proj, named_recipe("int8-token"), {}) is None


def test_copies_and_dtypes(saved: Callable[[str], Saved]) -> None:
    source = saved("tied")
    model = source.load("int8-token")
    found = source.run(model)
    head, table = model.get_submodule(HEAD), model.get_submodule(TABLE)
    assert head.weight_data is table.weight_data
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(source.run(twin), found)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert same_parts(half, model)
    assert half.dtype == half.get_submodule(HEAD).weight.dtype == source.run(half).dtype
    assert half.dtype == torch.bfloat16
    float16 = source.load("int8-token", dtype=torch.float16)
    assert source.run(float16).dtype == torch.float16
    empty = copy.deepcopy(model).to("meta")
    assert empty.get_submodule(HEAD).weight_data is empty.get_submodule(TABLE).weight_data
    with pytest.raises(ConfigError, match=r"its input is torch\.float64\. Remedy"):
        head(torch.ones(1, 32, dtype=torch.float64))


def test_what_transformers_keeps_in_float32_computes_in_it(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1,
                                   num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "float")
    loaded = type(model).from_pretrained(tmp_path / "float", dtype=torch.float16,
                                         quantization_config=ScalepropConfig("mxfp4"))
    loaded.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert same_parts(loaded, again)
    for each in (loaded, again):
        dtypes = {path.endswith(".wo"): module.weight_dtype for path, module in
                  scaled(each).items()}
        assert dtypes == {True: torch.float32, False: torch.float16}
    ids = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with torch.no_grad():
        assert torch.equal(loaded(**ids)[0], again(**ids)[0])


def test_tokens_are_those_of_the_float_model_and_of_the_reference(
    saved: Callable[[str], Saved]
) -> None:
    source = saved("untied")
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False,
               "pad_token_id": 0}
    fine = Role(format="e5m10[row]*f32")
    near = Recipe(name="near", description="", roles={"fprop.w": fine, "fprop.x": fine,
                                                      "embedding": fine})
    expected = source.model.generate(IDS, **options)
    assert torch.equal(source.load(near).generate(IDS, **options), expected)

    compiled = source.compile("mxfp4")
    tokens = IDS
    for _ in range(4):
        logits = compiled(input_ids=tokens, use_cache=False)[0]
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    found = source.load("mxfp4").generate(IDS, use_cache=False, **options)
    assert torch.equal(found, tokens)


def test_compile_keeps_the_codes(saved: Callable[[str], Saved]) -> None:
    source = saved("columns")
    model = source.load("mxfp4")
    found = source.run(model)
    compiled = scaleprop.compile(model, source.inputs, "int8-dynamic", backend="reference")
    assert torch.equal(compiled(**source.inputs)[0], found)
    formats = {(record.role, record.format, record.decided_by) for record in
               compiled.report.records if record.format}
    assert formats == {("fprop.w", "mxfp4:even", "model"), ("fprop.x", "mxfp4:even", "model"),
                       ("embedding", "mxfp8", "model")}
    stored = {as_bytes(tensor) for tensor in compiled.program.module.buffers()}
    assert all(as_bytes(part) in stored for module in scaled(model).values()
               for part in module.parts)
    traced: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(source.run(traced), found)


def test_convolutions_keep_their_codes(saved: Callable[[str], Saved]) -> None:
    source = saved("convolutions")
    model = source.load("int8-dynamic")
    compiled = scaleprop.compile(model, source.inputs, "fp8", backend="reference")
    assert torch.equal(compiled(**source.inputs)[0], source.run(model))
    weights = {record.operand: record for record in compiled.report.records
               if record.role == "fprop.w"}
    assert {f"{path}.weight" for path in scaled(model)} == weights.keys()
    assert {record.format for record in weights.values()} == {"int8[row]*f32"}
    assert {record.decided_by for record in weights.values()} == {"model"}
    for path, module in scaled(model).items():
        assert weights[f"{path}.weight"].nbytes == sum(part.nbytes for part in module.parts)
        assert weights[f"{path}.weight"].nbytes_high == source.model.get_parameter(
            f"{path}.weight").nbytes


@pytest.mark.parametrize("recipe", ["mxfp4", "int8-token"])
def test_dequantized_it_is_a_float_model(
    recipe: str, saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved("tied")
    model = source.load(recipe)
    weights = {path: module.weight for path, module in scaled(model).items()}
    plain = model.dequantize()
    assert not scaled(plain) and not hasattr(plain.config, "quantization_config")
    assert type(plain.get_submodule(HEAD)) is nn.Linear
    for path, weight in weights.items():
        assert torch.equal(plain.get_parameter(f"{path}.weight"), weight)
    shared = plain.get_submodule(HEAD).weight is plain.get_submodule(TABLE).weight
    assert shared == plain.config.tie_word_embeddings == (recipe == "int8-token")
    plain.save_pretrained(tmp_path)
    again, info = source.reload(tmp_path)
    assert not any(info.values()), info
    assert torch.equal(source.run(again), source.run(plain))


def test_tied_weights_that_differ_in_the_checkpoint_are_no_longer_tied(
    saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    source = saved("untied")
    source.model.save_pretrained(tmp_path / "float")
    path = tmp_path / "float" / "config.json"
    path.write_text(path.read_text().replace('"tie_word_embeddings": false',
                                             '"tie_word_embeddings": true'))
    model = source.load("int8-token", path.parent)
    assert same_parts(model, source.load("int8-token"))
    model.save_pretrained(tmp_path / "small")
    again, info = source.reload(tmp_path / "small")
    assert not any(info.values()), info
    assert same_parts(model, again)


# --- modules by themselves -----------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Centred(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight - self.weight.mean(), self.bias)


def test_subclasses_keep_their_forward_or_stay() -> None:
    recipe = named_recipe("mxfp4")
    module = Doubled(32, 4)
    plan = plan_for(module, recipe, {})
    assert plan is not None
    plain = nn.Linear(32, 4)
    plain.load_state_dict(module.state_dict())
    for each in (module, plain):
        scale_module(each, plan, plan.quantized(each.weight))
    assert isinstance(module, Doubled)
    x = torch.linspace(-1, 1, 64).view(2, 32)
    assert torch.equal(module(x), 2 * plain(x))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for stays in (Centred(32, 4), normed, nn.Embedding(4, 32, max_norm=1.0), nn.LayerNorm(4),
                  nn.Linear(4, 4, dtype=torch.float64), nn.ConvTranspose1d(4, 4, 3)):
        assert plan_for(stays, recipe, {}) is None
    assert plan_for(nn.Conv1d(4, 4, 3), recipe.replace(roles={}), {}) is None
