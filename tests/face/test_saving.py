"""Saving replaces saved models only, and leaves a complete version whatever happens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

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

    monkeypatch.setattr("scaleprop.storage.os.replace", refuse_the_new)
    with pytest.raises(OSError, match="no"):
        compiled.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert json.loads((folder / "config.json").read_text()) == config
    scaleprop.load(folder)
