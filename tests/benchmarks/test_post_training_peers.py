"""The peers' rows are filled by the peers' own arithmetic, and judged by the task's measure."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

from benchmarks import peers, post_training_peers
from benchmarks.post_training import Task

LEAST = {"W8A8": 23.0, "W4A8": 15.0, "W4": 15.0, "NVFP4": 13.0}  # decibels
REFUSED = {"W4A8|torchao SmoothQuant": "AssertionError", "W4|torchao GPTQ": "ValueError"}
ROWS = [row for row in post_training_peers.torchao_rows()
        if not row.unchecked and "PT2E" not in row.name]


@pytest.fixture(scope="module", autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def task() -> Task:
    """Two linears, one with blocks of 128 and one of 32; the measure is in decibels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    batches = [(torch.randn(4, 8, 128),) for _ in range(3)]
    inputs = torch.randn(4, 8, 128)
    expected = model(inputs)

    def measure(run: Callable[..., Any]) -> dict[str, float]:
        return {"value": peers.sqnr_db(run(inputs).float(), expected)}

    return Task(model, batches[0], batches, measure)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.fmt}|{row.name}")
def test_a_row_is_filled_or_says_why_not(
    row: post_training_peers.Row, task: Task, tmp_path: Path
) -> None:
    before = copy.deepcopy(task.model.state_dict())
    found = post_training_peers.cell(row, task, tmp_path)
    refused = REFUSED.get(f"{row.fmt}|{row.name}")
    if refused:
        assert found["refused"].startswith(refused), found
    else:
        assert LEAST[row.fmt] < found["value"] < 70, found  # and not float32
    after = task.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_unpacked_weights_are_the_kernels(task: Task) -> None:
    packed = post_training_peers._in_blocks(task, post_training_peers._packed_int4)
    inputs = task.calibration[0][0]
    through_kernel = packed(inputs)
    unpacked = post_training_peers._unpacked(packed)
    assert all(type(module.weight.data) is torch.Tensor for module in unpacked
               if isinstance(module, nn.Linear))
    torch.testing.assert_close(unpacked(inputs), through_kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ORT nearest", "ORT k-quant", "ORT SmoothQuant"])
def test_onnx_runtime_rows(name: str, task: Task, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    row = next(row for row in post_training_peers.ort_rows() if row.name == name)
    found = post_training_peers.cell(row, task, tmp_path)
    if name == "ORT SmoothQuant":
        assert "neural-compressor" in found["refused"]
    else:
        assert LEAST[row.fmt] < found["value"] < 70, found


SCRIPT = """
import json, pathlib, sys, torch
folder = pathlib.Path(sys.argv[1])
assert (folder / "model").read_text() == "saved"
print("a word of the tool's")
print(json.dumps({"cell": sys.argv[2], "refused": "Error: no"}), flush=True)
logits = [8.0 * torch.nn.functional.one_hot((ids + 1) % 32, 32)
          for ids in torch.load(folder / "evaluation.pt")]
torch.save(logits, folder / "logits.pt")
print(json.dumps({"cell": sys.argv[3], "logits": str(folder / "logits.pt")}), flush=True)
sys.exit(3)
"""


class _Saved(nn.Module):
    def save_pretrained(self, path: Path) -> None:
        path.write_text("saved")


class _Next(nn.Module):
    """Every id's next one, without doubt."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Saved()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return 8.0 * nn.functional.one_hot((ids + 1) % 32, 32)


def test_logits_of_another_interpreter_are_judged_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(post_training_peers, "ROWS_SCRIPT", script)
    windows = [torch.arange(6).repeat(2, 1) + start for start in (0, 9)]

    def measure(run: Callable[..., Any]) -> dict[str, float]:
        losses = [nn.functional.cross_entropy(run(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
                  for ids in windows]
        return {"value": math.exp(float(torch.stack(losses).mean()))}

    calibration = [(ids[:, :-1],) for ids in windows]
    model = _Next()
    task = Task(model, calibration[0], calibration, measure)
    found = post_training_peers.llm_compressor_rows(
        task, ["W4|one", "W4|two"], Path(sys.executable), tmp_path)
    assert next(iter(found)) == ("W4|one", {"refused": "Error: no"})
    assert next(iter(found)) == ("W4|two", pytest.approx(measure(model)))
    with pytest.raises(subprocess.CalledProcessError):  # what came before it broke is kept
        next(iter(found))
