"""The peers' table: the best rival is chosen per class and thread count, errors stay visible."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import compile_cost, harness
from benchmarks import ort_vs_peers as bench


def row(milliseconds: float | None, family: str = "onnx", error: str | None = None,
        size: int | None = 100) -> dict[str, Any]:
    """A row as the worker writes it, with three equal rounds."""
    seconds = [milliseconds / 1e3] * 3 if milliseconds is not None else None
    return {"family": family, "error": error, "build_seconds": 0.1, "file_bytes": size,
            "audit": None, "sqnr_db": 30.0, "keeps_input": family == "onnx",
            "max_difference": None,
            "timings": {"1": {"wall": seconds, "cpu": seconds}} if seconds else {}}


@pytest.fixture
def section() -> dict[str, Any]:
    return {
        "shapes": [[1, 4]], "linears": 2, "linear_bytes": 64, "seconds": 1.0,
        "plan": {"rounds": 3},
        "rows": {
            "ORT fp32": row(8.0),
            "ORT quantize_dynamic": row(2.0), "ORT quantize_static": row(4.0),
            "MatMulNBits 4-bit g32": row(1.0), "MatMulNBits 4-bit g128": row(None, error="Boom: x"),
            "ours int8": row(1.6, size=25), "ours int4": row(0.5),
            "torch.compile fp32": row(9.0, "torch"), "torchao PT2E static": row(3.0, "torch"),
            "ours int8, Inductor": row(1.5, "torch"),
        },
    }


@pytest.mark.parametrize(("name", "peer", "versus"), [
    ("ours int8", "ORT quantize_dynamic", 1.25),
    ("ours int4", "MatMulNBits 4-bit g32", 2.0),
    ("ours int8, Inductor", "torchao PT2E static", 2.0),
])
def test_each_row_is_held_against_the_fastest_peer_of_its_class(
    section: dict[str, Any], name: str, peer: str, versus: float
) -> None:
    names, base = bench.rivals(section, name)
    assert bench.best_peer(section, names, base, "1") == peer
    value = bench.ratio(section, name, peer, "1")
    assert value is not None
    assert value.median == pytest.approx(versus)


def test_the_table_shows_ratios_sizes_and_errors(section: dict[str, Any]) -> None:
    lines = bench.workload_table(section).splitlines()
    ours = next(line for line in lines if line.startswith("| ours int8 |"))
    assert "5.00 [5.00–5.00]" in ours
    assert "1.25 [1.25–1.25] (ORT quantize_dynamic)" in ours
    assert "0.250" in ours
    assert any("Boom: x" in line for line in lines)
    assert any("**no**" in line for line in lines if line.startswith("| torchao"))


def test_the_summary_skips_thread_counts_that_were_not_measured(section: dict[str, Any]) -> None:
    text = "\n".join(bench.summary({"mlp-4": section, "bad": {"error": "crashed"}}))
    assert "| mlp-4 | 1 | 1.25 | – | 2.00 | – | 2.00 | – | – |" in text
    assert "| mlp-4 | 2 |" not in text


def test_one_failed_run_fails_the_compile_cost_row() -> None:
    good = {"seconds": 1.0, "weights": 8, "peak": 1.5, "extra": 0.5, "file_ratio": 0.25,
            "stages": {"export": 1.0}}
    merged = compile_cost.merge([good, {**good, "seconds": 3.0}, {**good, "seconds": 2.0}])
    assert (merged["seconds"], merged["runs"]) == (2.0, 3)
    assert compile_cost.merge([good, {"error": "killed"}]) == {"error": "killed"}


def test_compile_cost_measures_a_tiny_model_in_its_own_process() -> None:
    result = harness.run_worker(
        "benchmarks.compile_cost",
        ["--worker", "tiny-mlp", "ORT quantize_dynamic", "--threads", "1"], 120, {})
    assert "error" not in result
    assert set(result["stages"]) == {"export", "quantize"}
    assert 0 < result["file_ratio"] < 0.5
    assert result["peak"] > result["extra"]
