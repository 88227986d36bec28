"""A written model is held to the reference node by node, and a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from scaleprop.backends.onnxruntime import OnnxRuntimeBackend, SessionConfig, check_nodes, emit
from scaleprop.backends.onnxruntime.session import write
from scaleprop.errors import MismatchError
from scaleprop.passes.base import Program
from scaleprop.passes.capture import capture
from scaleprop.passes.pipeline import build
from scaleprop.recipes import named_recipe


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.LayerNorm(96), torch.nn.Linear(96, 32)
    )
    captured = capture(model, (torch.randn(4, 7, 64),))
    return build(named_recipe("int8-dynamic")).run(captured)


def written(program: Program, folder: Path) -> Path:
    path = folder / "model.onnx"
    write(emit(program), path, None, lambda _: None)
    return path


def check(program: Program, path: Path) -> float:
    return check_nodes(emit(program), path, program, [program.example_leaves], SessionConfig())


def test_a_right_file_passes_and_leaves_no_probe(program: Program, tmp_path: Path):
    path = written(program, tmp_path)
    assert 0.0 <= check(program, path) < 2.0**-11
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]


def test_one_changed_weight_is_found_at_its_node(program: Program, tmp_path: Path):
    path = written(program, tmp_path)
    model = onnx.load(path)
    (weight, *_) = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    codes = onnx.numpy_helper.to_array(weight).copy()
    codes.flat[0] = np.int8(-codes.flat[0] - 1)
    weight.CopyFrom(onnx.numpy_helper.from_array(codes, weight.name))
    onnx.save(model, path)
    with pytest.raises(MismatchError, match=r"scaled_mm.*given the same inputs"):
        check(program, path)


def test_one_changed_operator_is_found_at_its_node(program: Program, tmp_path: Path):
    path = written(program, tmp_path)
    model = onnx.load(path)
    (norm,) = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    (epsilon,) = [a for a in norm.attribute if a.name == "epsilon"]
    epsilon.f = 0.5
    onnx.save(model, path)
    with pytest.raises(MismatchError, match="layer_norm"):
        check(program, path)


def test_a_failing_check_leaves_the_old_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def fail(*_: object) -> float:
        raise MismatchError("node 'x'")

    monkeypatch.setattr("scaleprop.backends.onnxruntime.check_nodes", fail)
    with pytest.raises(MismatchError):
        OnnxRuntimeBackend().export(program, path)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["model.onnx"]
