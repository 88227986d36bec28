"""Folders: complete or not there, in shards; damaged and foreign ones are refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import scaleprop
from scaleprop.api import CompiledModel
from scaleprop.cli import app
from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.interchange import decoded
from scaleprop.interchange.shards import ShardReader, ShardWriter, parse_size
from scaleprop.passes.base import Program
from tests.interchange.tiny import IDS, compiled, recipe, same_bits, tensors

STATIC = recipe("int8[row]*f32", "int8[tensor]*f32+zp", static=True)


@pytest.fixture(scope="module")
def ours(program: Program) -> CompiledModel:
    return compiled(program, STATIC)


@pytest.fixture
def folder(ours: CompiledModel, model: Any, tmp_path: Path) -> Path:
    return ours.save_pretrained(tmp_path / "checkpoint", model, check=False)


def change(folder: Path, **settings: Any) -> None:
    file = folder / "config.json"
    data = json.loads(file.read_text())
    data["quantization_config"] |= settings
    file.write_text(json.dumps(data))


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


# ---- writing -------------------------------------------------------------------------------------


def test_shards_hold_what_one_file_does(
    ours: CompiledModel, model: Any, folder: Path, tmp_path: Path
):
    parts = ours.save_pretrained(tmp_path / "parts", model, max_shard_size="50KB", check=False)
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((parts / file).stat().st_size < 60_000 for file in files)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    found = tensors(parts)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(part.nbytes for part in found.values())
    assert same_bits(found, tensors(folder))
    assert same_bits(dict(decoded(parts).state_dict()), dict(decoded(folder).state_dict()))
    with torch.no_grad():
        one, many = (AutoModelForCausalLM.from_pretrained(path).eval()(IDS).logits
                     for path in (folder, parts))  # fmt: skip
    assert torch.equal(one, many)


def test_only_one_shard_is_held(tmp_path: Path):
    writer = ShardWriter(tmp_path, 100)
    for index in range(5):
        writer.add(f"{index}", torch.zeros(10))
        assert sum(part.nbytes for part in writer._shard.values()) <= 100
    writer.finish()
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), (7, 7)])
def test_sizes(size: Any, expected: int):
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "five", "-1MB", 0, True, "3XB"])
def test_sizes_that_are_none(size: Any):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(size)


def test_folders_of_others_are_left_alone(ours: CompiledModel, model: Any, tmp_path: Path):
    other = tmp_path / "other"
    model.save_pretrained(other)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    with pytest.raises(ConfigError, match="is not a checkpoint that scaleprop wrote"):
        ours.save_pretrained(other, model, check=False)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_links_stay_and_the_working_directory_is_refused(
    ours: CompiledModel, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    ours.save_pretrained(tmp_path / "link", model, check=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is the working directory"):
        ours.save_pretrained(".", model, check=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link", "real"]
    assert not list((tmp_path / "empty").iterdir())


def test_an_interrupted_write_leaves_the_old_one(
    ours: CompiledModel, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    (folder / "mark").touch()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(KeyboardInterrupt):
            ours.save_pretrained(folder, model, check=False)
    assert (folder / "mark").is_file()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    ours.save_pretrained(folder, model, check=False)
    assert not (folder / "mark").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_folder_is_there_at_any_moment(
    ours: CompiledModel, model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    rename = os.replace

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        assert (folder / "config.json").is_file()

    monkeypatch.setattr(os, "replace", watched)
    left = folder.with_name(f".{folder.name}.writing")  # as a killed write leaves it
    left.mkdir()
    (left / "half.safetensors").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "mark").touch()
    ours.save_pretrained(folder, model, check=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_folders_that_cannot_be_written(ours: CompiledModel, model: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot write .*Remedy: a shorter name"):
        ours.save_pretrained(tmp_path / ("n" * 300), model, check=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot write .*file"):
        ours.save_pretrained(tmp_path / "file" / "inside", model, check=False)
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="is not a checkpoint that scaleprop wrote"):
        ours.save_pretrained(deep, model, check=False)


@pytest.mark.parametrize(("settings", "why"), [
    ("generation_config", "like.generation_config.*`temperature`.*GenerationConfig()"),
    ("config", "like.config.*'temperature': 0.5.*Remedy: move .* to like.generation_config"),
])
def test_settings_that_transformers_refuses(
    ours: CompiledModel, model: Any, settings: str, why: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(getattr(model, settings), "temperature", 0.5, raising=False)
    with pytest.raises(ConfigError, match=f"(?s){why}"):
        ours.save_pretrained(tmp_path / "checkpoint", model, check=False)
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_comes_along(ours: CompiledModel, model: Any, tmp_path: Path):
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "README.md").write_text("of the model")
    (source / "quantize_config.json").write_text("{}")
    like = AutoModelForCausalLM.from_pretrained(source)
    folder = ours.save_pretrained(tmp_path / "1", like, check=False)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "README.md").exists()
    assert not (folder / "quantize_config.json").exists()
    assert (folder / "generation_config.json").is_file()

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "given").touch()

    again = ours.save_pretrained(tmp_path / "2", like, tokenizer=Tokenizer(), check=False)
    assert (again / "given").is_file()
    assert not (again / "tokenizer.json").exists()


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"quantization_status": "frozen"}, "'frozen': its weights are no codes"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "has kv_cache_scheme: that is not read"),
        ({"transform_config": {"config_groups": {}}}, "has transform_config"),
        ({"config_groups": {}}, "no config group is for it"),
        ({"config_groups": ["W8A8"]}, "no config_groups"),
        ({"quant_method": "hqq"}, "quant_method 'hqq' is unknown"),
        ({"quant_method": "scaleprop"}, "Remedy: load it with transformers' from_pretrained"),
        ({"config_groups": {"a": {"targets": ["Linear"]}}}, "says nothing of weights"),
        ({"config_groups": {"a": {"targets": None}}}, "targets of a config group are None"),
        ({"config_groups": {"a": {"targets": ["re:("]}}}, r"'re:\('.* is no pattern"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8},
                                  "input_activations": [1]}}}, "nothing of input_activations"),
    ],
)
def test_settings_that_are_not_read(folder: Path, settings: dict[str, Any], why: str):
    change(folder, **settings)
    with pytest.raises(ConfigError, match=why):
        decoded(folder)


@pytest.mark.parametrize(
    ("weights", "inputs", "why"),
    [
        ({"num_bits": 5}, {}, "int of 5 bits"),
        ({"type": "float", "num_bits": 16}, {}, "float of 16 bits"),
        ({"strategy": "attn_head"}, {}, "strategy 'attn_head'"),
        ({"strategy": ["channel"]}, {}, r"strategy \['channel'\]"),
        ({"strategy": "block", "block_structure": [1, 2, 3]}, {}, ".*1x2x3"),
        ({}, {"strategy": "tensor_group", "dynamic": True}, "a scale of the whole tensor found at"),
        ({}, {"strategy": "group", "group_size": 32, "dynamic": False}, "static scales per"),
    ],
)
def test_schemes_that_are_not_read(
    folder: Path, weights: dict[str, Any], inputs: dict[str, Any], why: str
):
    data = json.loads((folder / "config.json").read_text())
    (group,) = data["quantization_config"]["config_groups"].values()
    group["weights"] |= weights
    group["input_activations"] |= inputs
    change(folder, config_groups={"group": group})
    with pytest.raises(ConfigError, match=f"(lm_head|proj): {why}"):
        decoded(folder)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda state: state.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda state: state.pop("lm_head.weight"), "lm_head: weight is missing"),
        (lambda state: state.pop("lm_head.input_scale"), "lm_head: .*input_scale is missing"),
        (lambda state: state.update({"lm_head.weight": state["lm_head.weight"][:4]}), "lm_head"),
        (lambda state: state.update({"nowhere.weight_scale": torch.ones(1)}), "nowhere has a wei"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, edit: Callable[..., Any], why: str):
    change_tensors(folder, edit)
    with pytest.raises(ConfigError, match=why):
        decoded(folder)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"architectures": ["logging"]}, "is none of transformers' own"),
        ({"architectures": ["AutoModel"]}, "is none of transformers' own"),
        ({"architectures": [3]}, "is none of transformers' own"),
        ({"dtype": "float99"}, "cannot read its config.json"),
        ({"hidden_size": "x"}, "cannot read its config.json"),
    ],
)
def test_configurations_of_no_model(folder: Path, settings: dict[str, Any], why: str):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ConfigError, match=why):
        decoded(folder)


def test_code_in_a_folder_is_neither_run_nor_offered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    file = folder / "config.json"
    code = {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.Config"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (folder / "code.py").write_text("raise SystemExit('it ran')")

    def asked(prompt: str = "") -> str:
        pytest.fail(f"asked {prompt!r}")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        decoded(folder)


def test_settings_of_generation_and_tokenizers_survive(
    ours: CompiledModel, folder: Path, tmp_path: Path
):
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [7, 9]}))
    (folder / "tokenizer.json").write_text("{}")
    like = decoded(folder)
    again = ours.save_pretrained(tmp_path / "again", like, check=False)
    assert json.loads((again / "generation_config.json").read_text())["eos_token_id"] == [7, 9]
    assert (again / "tokenizer.json").read_text() == "{}"


def test_nothing_is_unpickled(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"has pytorch_model\.bin, which would have to be unpick"):
        decoded(folder)


def test_damaged_files(folder: Path, tmp_path: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        decoded(folder)
    file.unlink()
    with pytest.raises(ConfigError, match="has neither"):
        decoded(folder)
    for text in ("{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="is no checkpoint of transformers"):
            decoded(folder)
    with pytest.raises(ConfigError, match="is no checkpoint of transformers"):
        scaleprop.from_pretrained(tmp_path / "nowhere", IDS)


def test_an_index_cannot_lead_out_of_its_folder(folder: Path):
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lm_head.weight" in ShardReader(folder)  # of two, transformers reads the single file
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="which is not in its folder"):
        ShardReader(folder)


def test_a_model_that_is_not_quantized(model: Any, tmp_path: Path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no quantization_config\. Remedy"):
        scaleprop.from_pretrained(tmp_path, {"input_ids": IDS})


def test_missing_libraries_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("scaleprop.interchange.libraries.importlib.import_module", missing)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[save\]"'):
        ShardReader(folder)


# ---- command line --------------------------------------------------------------------------------


def test_the_command_line_converts(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model.save_pretrained(tmp_path / "0")
    source, out, again = (str(tmp_path / name) for name in "012")
    plain = ["--backend", "reference"]
    coded = ["--format", "compressed-tensors"]
    assert app.run(["compile", source, *plain, "--recipe", "int4-g32", "--out", out, *coded]) == 0
    assert app.run(["compile", out, *plain, "--out", again, *coded]) == 0
    assert same_bits(tensors(Path(out)), tensors(Path(again)))
    capsys.readouterr()
    assert app.run(["compile", out, *plain, "--recipe", "int8"]) == app.REFUSED
    assert "is taken as it is: leave out --recipe" in capsys.readouterr().err
    assert app.run(["compile", out, *plain, *coded]) == app.REFUSED
    assert "say where to, with --out" in capsys.readouterr().err
    assert app.run(["compile", out, *plain, "--format", "onnx", "--out", again]) == app.REFUSED
    assert "is named otherwise than an ONNX file" in capsys.readouterr().err
