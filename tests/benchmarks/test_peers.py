"""The peers' toolchains run, and the kernel audit tells integer from float products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from benchmarks import minilm_fidelity, peers, workloads
from benchmarks.sentences import sentences


@pytest.fixture(scope="module", autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny() -> workloads.Workload:
    return workloads.TINY["tiny-mlp"]()


@pytest.fixture(scope="module")
def source(tiny: workloads.Workload, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "fp32.onnx"
    return peers.export_fp32(tiny.model, tiny.inputs, path)


def test_the_float_export_has_only_float_products(source: Path, tmp_path: Path) -> None:
    audit = peers.audit(source, tmp_path / "optimized.onnx")
    assert (audit.integer, audit.floating) == (0, 2)


@pytest.mark.parametrize(("name", "least_sqnr", "largest_size"), [
    ("ORT quantize_dynamic", 30, 0.4),
    ("ORT quantize_static", 28, 0.4),
    ("ORT quantize_static, linears only", 28, 0.4),
    ("MatMulNBits 4-bit g32", 15, 0.3),
    ("MatMulNBits 4-bit g128", 15, 0.3),
])
def test_every_onnx_peer_quantizes_both_linears(
    name: str, least_sqnr: float, largest_size: float, tiny: workloads.Workload, source: Path,
    tmp_path: Path,
) -> None:
    path = peers.onnx_peers(tiny, source)[name](tmp_path / "model.onnx")
    audit = peers.audit(path, tmp_path / "optimized.onnx")
    assert (audit.integer, audit.floating) == (2, 0), audit
    assert peers.file_bytes(path) / peers.file_bytes(source) < largest_size
    output = torch.as_tensor(peers.ort_call(peers.session(path, 1), tiny.inputs)()[0])
    assert peers.sqnr_db(output, tiny.model(*tiny.inputs)) > least_sqnr


@pytest.mark.parametrize("dynamic", [False, True])
def test_pt2e_converts(dynamic: bool, tiny: workloads.Workload) -> None:
    pytest.importorskip("torchao")
    module = peers.pt2e_module(tiny.model, tiny.inputs, tiny.calibration, dynamic)
    assert peers.sqnr_db(module(*tiny.inputs), tiny.model(*tiny.inputs)) > 25


def test_weights_dequantized_at_run_time_count_as_float(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((16, 16), np.int8), "w")
    scale = numpy_helper.from_array(np.float32(0.5), "s")
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["wf"], to=TensorProto.FLOAT),
         helper.make_node("Mul", ["wf", "s"], ["wd"]),
         helper.make_node("MatMul", ["x", "wd"], ["a"]),
         helper.make_node("MatMul", ["a", "x"], ["y"])],  # no constant: not a linear
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16, 16])], [weight, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    audit = peers.audit(tmp_path / "m.onnx", tmp_path / "optimized.onnx")
    assert (audit.integer, audit.floating) == (0, 1)


def test_external_data_counts_to_the_file_size(tiny: workloads.Workload, tmp_path: Path) -> None:
    path = peers.export_fp32(tiny.model, tiny.inputs, tmp_path / "m.onnx", external_data=True)
    assert peers.file_bytes(path) > tiny.linear_bytes > path.stat().st_size


def test_sqnr_of_a_known_error() -> None:
    expected = torch.ones(100)
    assert peers.sqnr_db(expected * 1.1, expected) == pytest.approx(20.0, abs=1e-4)
    assert peers.sqnr_db(expected, expected) == float("inf")


def test_sentences_are_distinct_prose_and_the_same_every_time() -> None:
    sample = sentences(40)
    assert sample == sentences(60)[:40]
    assert len(set(sample)) == 40
    assert all(len(sentence.split()) >= 5 for sentence in sample)
    with pytest.raises(ValueError, match="docstring sentences"):
        sentences(10**6)


def test_embeddings_ignore_padding_and_are_unit_vectors() -> None:
    hidden = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    pooled = minilm_fidelity.pool(hidden, mask)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2, dtype=torch.float64))
    changed = hidden.clone()
    changed[0, 2:] = 100.0
    torch.testing.assert_close(minilm_fidelity.pool(changed, mask), pooled)
    figures = minilm_fidelity.fidelity(pooled, pooled)
    assert figures["min"] == pytest.approx(1.0)
