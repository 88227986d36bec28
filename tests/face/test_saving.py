"""Saving replaces saved models only, and leaves a complete version whatever happens."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.export import Dim, export

import scaleprop
from scaleprop.api import CompiledModel
from scaleprop.errors import ConfigError


@pytest.fixture(scope="module")
def compiled() -> CompiledModel:
    torch.manual_seed(0)
    return scaleprop.compile(torch.nn.Linear(8, 8), torch.randn(2, 8), backend="reference")


@pytest.mark.parametrize(
    "config", ['{"model_type": "bert"}', '{"format_version": 1}', "[1]", "not JSON"]
)
def test_a_folder_of_another_library_is_left_alone(
    compiled: CompiledModel, config: str, tmp_path: Path
):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ConfigError, match="not a saved model"):
        compiled.save(folder)
    assert (folder / "config.json").read_text() == config
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_a_saved_model_is_replaced_without_leftovers(compiled: CompiledModel, tmp_path: Path):
    folder = compiled.save(tmp_path / "saved")
    (folder / "stale.txt").write_text("of the old version")
    compiled.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert not (folder / "stale.txt").exists()
    (tmp_path / "empty").mkdir()
    scaleprop.load(compiled.save(tmp_path / "empty"))


def test_a_failing_rename_puts_the_old_version_back(
    compiled: CompiledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = compiled.save(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    rename = os.replace

    def refuse_the_new(source: Path, target: Path) -> None:
        if target == folder and ".old." not in source.name:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr("scaleprop.durable.os.replace", refuse_the_new)
    monkeypatch.setattr("scaleprop.durable._exchange", lambda *_: False)  # as on other systems
    with pytest.raises(ConfigError, match=r"cannot write .*saved: no\. Remedy"):
        compiled.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert json.loads((folder / "config.json").read_text()) == config
    scaleprop.load(folder)


@pytest.mark.parametrize(("change", "says"), [
    (lambda config: [config], "holds no object"),
    (lambda config: {k: v for k, v in config.items() if k != "in_spec"}, "damaged.*in_spec"),
    (lambda config: {**config, "dynamic_axes": 3}, "damaged"),
])
def test_a_damaged_config_is_refused(
    compiled: CompiledModel, change: Callable[[Any], Any], says: str, tmp_path: Path
):
    folder = compiled.save(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(ConfigError, match=says):
        scaleprop.load(folder, verify=False)
    with pytest.raises(ConfigError, match=r"no object|config\.json is damaged"):
        scaleprop.load(folder)


class Pair(torch.nn.Module):
    """Two inputs that never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear(a), self.linear(b)


def refusal(model: CompiledModel, *sizes: int) -> str:
    with pytest.raises(ConfigError) as refused:
        model(*(torch.randn(size, 8) for size in sizes))
    return str(refused.value)


def test_a_batch_of_one_is_loaded_as_any_batch(tmp_path: Path):
    compiled = scaleprop.compile(torch.nn.Linear(8, 4), torch.randn(1, 8))
    loaded = scaleprop.load(compiled.save(tmp_path / "saved"))
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), compiled(x))
    assert torch.equal(loaded(x[:1]), compiled(x[:1]))
    graph = onnx.load(loaded.export(tmp_path / "m.onnx")).graph
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("ratio", [1, 2])
def test_sizes_that_depend_on_each_other_still_do(size: int, ratio: int, tmp_path: Path):
    n = Dim("n")
    given = torch.randn(size * ratio, 8), torch.randn(size, 8)
    shapes = ({0: ratio * n if ratio > 1 else n}, {0: n})
    exported = export(Pair(), (torch.randn(6 * ratio, 8), torch.randn(6, 8)),
                      dynamic_shapes=shapes)
    compiled = scaleprop.compile(exported, given, backend="reference")
    loaded = scaleprop.load(compiled.save(tmp_path / "saved"))
    assert loaded(torch.randn(3 * ratio, 8), torch.randn(3, 8))[0].shape == (3 * ratio, 8)
    assert refusal(loaded, 3 * ratio, 4) == refusal(compiled, 3 * ratio, 4)
    assert loaded.program.dynamic_axes == compiled.program.dynamic_axes
