"""Writing ONNX files: whole or not at all, checked, with external data where asked."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn as nn

import scaleprop.backends.onnxruntime as onnxruntime_backend
from scaleprop import durable
from scaleprop.backends.onnxruntime import OnnxRuntimeBackend, SessionConfig, emit, session
from scaleprop.backends.onnxruntime.sizes import other_size
from scaleprop.errors import BackendError, ConfigError, MismatchError
from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture

BACKEND = OnnxRuntimeBackend()


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    return capture(model, (torch.randn(3, 32),), {}, ({0: torch.export.Dim("batch")},))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_runs_on_stock_onnxruntime(program: Program, tmp_path: Path) -> None:
    path = BACKEND.export(program, tmp_path / "model.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    x = torch.randn(7, 32)
    stock = onnxruntime.InferenceSession(str(path))
    (result,) = stock.run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), program.module(x))
    assert names(tmp_path) == ["model.onnx"]


def test_export_checks_another_size(program: Program, tmp_path: Path) -> None:
    assert other_size(program)[0].shape == (2, 32)  # pyright: ignore[reportOptionalSubscript]
    fixed = dataclasses.replace(program, dynamic_axes={})
    assert other_size(fixed) is None
    assert BACKEND.export(program, tmp_path / "model.onnx").exists()


class Windows(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], x.shape[1] // 4, 4, 8).mean(2)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([y, y])


@pytest.mark.parametrize(
    ("model", "sizes", "other"),
    [(Windows(), [(2, 8, 8)], [(4, 16, 8)]), (Halves(), [(6, 8), (3, 8)], [(12, 16), (6, 16)])],
)
def test_another_size_is_one_that_the_program_is_for(
    model: nn.Module, sizes: Any, other: Any, tmp_path: Path
) -> None:
    guarded = capture(model, tuple(torch.randn(size) for size in sizes))
    assert [leaf.shape for leaf in other_size(guarded) or ()] == other
    path = BACKEND.export(guarded, tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert tuple(json.loads(metadata["scaleprop.guards"])) == guarded.guards != ()


def test_no_other_size_is_a_warning(program: Program, tmp_path: Path, caplog: Any) -> None:
    stuck = program.replace(guards=("input.shape[0] == 3",))
    assert other_size(stuck) is None
    BACKEND.export(program, tmp_path / "model.onnx")
    BACKEND.export(program.replace(dynamic_axes={}), tmp_path / "model.onnx")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    BACKEND.export(stuck, tmp_path / "model.onnx")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "checked at the example's sizes alone" in record.getMessage()
    assert record.getMessage().endswith("satisfies input.shape[0] == 3")


def same_results(path: Path, program: Program) -> None:
    x = torch.randn(4, 32)
    (result,) = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), program.module(x))


def test_external_data(program: Program, tmp_path: Path) -> None:
    path = BACKEND.export(program, tmp_path / "model.onnx", external_data=True)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    same_results(path, program)
    BACKEND.export(program, path, external_data=False)
    assert names(tmp_path) == ["model.onnx"]  # the stale weights are gone


def test_weights_of_the_old_file_stay_until_the_new_one_is_there(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = BACKEND.export(program, tmp_path / "model.onnx", external_data=True)
    before = path.read_bytes()
    other = copy.deepcopy(program)
    with torch.no_grad():
        other.module.get_parameter("0.weight").mul_(2)

    def stop(source: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt  # between the two renames
        os.replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("scaleprop.durable.replace", stop)
        with pytest.raises(KeyboardInterrupt):
            BACKEND.export(other, path, external_data=True)
    assert names(tmp_path) == ["model.onnx", "model.onnx.1.data", "model.onnx.data"]
    assert path.read_bytes() == before
    same_results(path, program)
    for data in ("model.onnx.1.data", "model.onnx.data"):
        BACKEND.export(other, path, external_data=True)
        assert names(tmp_path) == ["model.onnx", data]
        same_results(path, other)


def reading(place: str, offset: str) -> bytes:
    """A file with a tensor in ``model.onnx.data``: an initializer, or a constant of a branch."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location="EXTERNAL")
    tensor.external_data.add(key="location", value="model.onnx.data")
    tensor.external_data.add(key="offset", value=offset)
    inner = onnx.helper.make_graph([], "branch", [], [], [tensor])
    if place == "initializer":
        return onnx.helper.make_model(inner).SerializeToString()
    branches = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    return onnx.helper.make_model(
        onnx.helper.make_graph([branches], "graph", [], [])).SerializeToString()


@pytest.mark.parametrize(("old", "data"), [
    (reading("initializer", "0"), "model.onnx.1.data"),
    (reading("initializer", "nowhere"), "model.onnx.1.data"),
    (reading("branch", "0"), "model.onnx.1.data"),
    (onnx.helper.make_model(onnx.helper.make_graph([], "", [], [
        onnx.ValueInfoProto(name="y", type=onnx.TypeProto(
            tensor_type=onnx.TypeProto.Tensor(elem_type=99)))])).SerializeToString(),
     "model.onnx.data"),
    (b"junk", "model.onnx.data"), (b"", "model.onnx.data"),
], ids=["reads", "damaged", "branch", "type", "junk", "empty"])
def test_what_is_replaced_need_not_be_a_model(
    program: Program, old: bytes, data: str, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").write_bytes(old)
    path = BACKEND.export(program, tmp_path / "model.onnx", external_data=True, check=False)
    assert names(tmp_path) == ["model.onnx", data]
    same_results(path, program)


@pytest.mark.parametrize("external", [False, True])
def test_two_exports_to_one_path_do_not_mix(
    program: Program, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, met = tmp_path / "model.onnx", durable.replace, threading.Event()
    linears = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8))  # weights alone would hide a mix
    other = capture(linears, (torch.randn(3, 32),), {}, ({0: torch.export.Dim("batch")},))

    def export() -> None:
        try:
            BACKEND.export(other, path, external_data=True, check=False)
        finally:
            met.set()

    second = threading.Thread(target=export)

    def between(source: Path, target: Path) -> None:
        rename(source, target)
        if second.ident is None:  # the first file of the first export has its name
            second.start()
            met.wait()  # until the second is done, or waits

    monkeypatch.setattr(durable, "replace", between)
    monkeypatch.setattr(durable.logger, "warning", lambda *_: met.set())
    BACKEND.export(program, path, external_data=external, check=False)
    second.join()
    assert len(names(tmp_path)) == 2
    same_results(path, other)


def test_large_models_choose_external_data(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "INLINE_LIMIT", 100)
    path = BACKEND.export(program, tmp_path / "model.onnx")
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    same_results(path, program)
    x = torch.randn(4, 32)
    (result,) = BACKEND.lower(program)([x])  # through a temporary file
    torch.testing.assert_close(result, program.module(x))


@pytest.mark.parametrize("external", [False, True])
def test_failed_check_keeps_the_old_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    wrong = copy.deepcopy(program)
    with torch.no_grad():  # the file is right for another program
        wrong.module.get_parameter("0.weight").mul_(1.01)
    monkeypatch.setattr(onnxruntime_backend, "emit", lambda _program, _metadata: emit(program))
    with pytest.raises(MismatchError, match=r"'linear'.*differs from the reference"):
        BACKEND.export(wrong, path, external)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


def test_interrupted_export_leaves_nothing(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: Any, path: Path, external: bool) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        BACKEND.export(program, tmp_path / "model.onnx")
    assert names(tmp_path) == []


def test_unwritable_paths(program: Program, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"end in \.onnx"):
        BACKEND.export(program, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="directory"):
        BACKEND.export(program, tmp_path / "folder.onnx")
    with pytest.raises(ConfigError, match="existing, writable folder"):
        BACKEND.export(program, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ConfigError, match="existing, writable folder"):
        BACKEND.export(program, tmp_path / "file" / "model.onnx")


def test_wrong_inputs_are_named(program: Program) -> None:
    executable = BACKEND.lower(program)
    with pytest.raises(ConfigError, match="expected 1 inputs, got 2"):
        executable([torch.randn(3, 32), 1])
    with pytest.raises(ConfigError, match=r"'input': expected torch\.float32, got torch\.float64"):
        executable([torch.randn(3, 32, dtype=torch.float64)])
    with pytest.raises(BackendError, match=r"onnxruntime failed on inputs .*\[3, 31\]"):
        executable([torch.randn(3, 31)])


def test_session_config(program: Program) -> None:
    config = SessionConfig(threads=1, spinning=False, entries={"session.intra_op.allow_spinning":
                                                               "0"})
    x = torch.randn(2, 32)
    (result,) = OnnxRuntimeBackend(config=config).lower(program)([x])
    torch.testing.assert_close(result, program.module(x))
    options = config.options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_a_session_is_opened_once_at_the_first_call(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    original = onnxruntime.InferenceSession

    def counting(*args: Any, **kwargs: Any) -> onnxruntime.InferenceSession:
        opened.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counting)
    executable = BACKEND.lower(program)
    assert not opened
    x = torch.randn(2, 32)
    first, again = executable([x])[0], executable([x])[0]
    assert len(opened) == 1
    torch.testing.assert_close(first, program.module(x))
    assert torch.equal(first, again)


def test_an_unchecked_export_only_writes(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    with monkeypatch.context() as patched:
        patched.setattr(onnxruntime, "InferenceSession", refuse)
        path = BACKEND.export(program, tmp_path / "model.onnx", check=False)
    checked = BACKEND.export(program, tmp_path / "checked.onnx")
    assert path.read_bytes() == checked.read_bytes()
