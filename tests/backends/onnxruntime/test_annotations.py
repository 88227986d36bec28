"""What ONNX viewers show of formats and scales; and that runtimes take no notice of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.backends.onnxruntime import OnnxRuntimeBackend
from scaleprop.report.graph.model import power_of_two


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module", params=["int8", "mxfp4", "int4"])
def files(
    request: pytest.FixtureRequest, ids: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> tuple[scaleprop.CompiledModel, Path, Path]:
    """A compiled model, its export, and the same file without annotations."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("annotated")
    compiled = scaleprop.compile(Model().eval(), (ids,), request.param, calibration=[(ids,)])
    annotated = compiled.export(folder / "annotated.onnx")
    plain = OnnxRuntimeBackend().export(compiled.program, folder / "plain.onnx", check=False)
    return compiled, annotated, plain


def entries(item: onnx.NodeProto | onnx.ValueInfoProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in item.metadata_props}


def test_nodes_and_values_say_how_they_are_quantized(
    files: tuple[scaleprop.CompiledModel, Path, Path],
) -> None:
    compiled, path, _ = files
    model = onnx.load(path)
    nodes = {entries(node)["scaleprop.node"]: node for node in model.graph.node
             if "scaleprop.w" in entries(node)}
    assert len(nodes) == 2
    for record in compiled.report.records:
        if record.role not in ("fprop.x", "fprop.w"):
            continue
        node = nodes[record.node]
        told = entries(node)[f"scaleprop.{record.role[-1]}"]
        assert told.startswith(f"{record.operand}: {record.format or 'high: '}")
        assert told.endswith(f"by {record.decided_by}")
        assert told in node.doc_string
        assert "test_annotations.py:" in node.doc_string
        if record.sqnr_db is not None:
            assert f"SQNR {record.sqnr_db:.1f} dB" in told
    stored = {value.name: entries(value)["scaleprop.stored_as"] for value in model.graph.value_info
              if "scaleprop.stored_as" in entries(value)}
    assert any("up.weight" in name or "up_weight" in name for name in stored)


def test_scales_are_those_of_calibration(
    files: tuple[scaleprop.CompiledModel, Path, Path], ids: torch.Tensor
) -> None:
    compiled, path, _ = files
    if compiled.recipe.name != "int8":
        assert "static scale" not in onnx.load(path).SerializeToString().decode("latin-1")
        return
    torch.manual_seed(0)
    model = Model().eval()
    x = model.table(ids).detach()
    scale = (float(x.max()) - float(x.min())) / 255
    rows = model.up.weight.detach().abs().amax(dim=1) / 127
    node = next(node for node in onnx.load(path).graph.node
                if entries(node).get("scaleprop.w", "").startswith("up.weight"))
    assert f"static scale {power_of_two(scale)}," in entries(node)["scaleprop.x"]
    ends = "…".join(power_of_two(float(end)) for end in (rows.min(), rows.max()))
    assert f"scale {ends}," in entries(node)["scaleprop.w"]


def optimised(path: Path) -> onnx.ModelProto:
    """What onnxruntime runs of a file, without what it says of itself."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath)
    del model.metadata_props[:]
    model.graph.doc_string = ""
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input,
                 *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    return model


def test_onnxruntime_runs_the_same(
    files: tuple[scaleprop.CompiledModel, Path, Path], ids: torch.Tensor
) -> None:
    _, annotated, plain = files
    onnx.checker.check_model(str(annotated))
    results = [np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"ids": ids.numpy()})[0]) for path in (annotated, plain)]
    assert results[0].tobytes() == results[1].tobytes()
    first, second = optimised(annotated), optimised(plain)
    assert first.SerializeToString(deterministic=True) == \
        second.SerializeToString(deterministic=True)
    assert annotated.stat().st_size - plain.stat().st_size < 8192


class Tied(nn.Module):
    """One matrix that is gathered from, and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(ids)))


def test_each_form_of_a_tied_weight_says_its_own_format_and_scale(
    ids: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    compiled = scaleprop.compile(Tied().eval(), (ids,), "mxfp4")
    model = onnx.load(compiled.export(tmp_path / "tied.onnx", check=False))
    by_target = {edge.source: edge.forward for edge in compiled.graph_view("").edges
                 if edge.source.startswith("head_weight")}
    scales = {scale.format: scale.text for scale in by_target.values() if scale is not None}
    assert sorted(scales) == ["mxfp4:even", "mxfp8"] and len(set(scales.values())) == 2
    told = [entry.value for node in model.graph.node for entry in node.metadata_props
            if entry.key in ("scaleprop.w", "scaleprop.embedding")]
    stored = [entries(value)["scaleprop.stored_as"]
              for value in (*model.graph.initializer, *model.graph.value_info)
              if "scaleprop.stored_as" in entries(value)]
    assert len(told) == len(set(stored)) == 2
    for fmt, scale in scales.items():
        assert any(f"head.weight: {fmt}, scale {scale}, " in each for each in told)
        assert any(each.startswith(f"{fmt}, scale {scale}, ") for each in stored)
