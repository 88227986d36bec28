"""The CUDA benchmarks run without a device, and what goes wrong on one costs a row alone."""

from __future__ import annotations

import importlib
import re
import time

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from benchmarks import cuda_harness, cuda_timing, harness, kernel_instructions
from tests.benchmarks import troubled_rows

# every function that measures; --smoke without --only takes all rows, and longer
TRIED = {
    "cuda_quantize": "mxfp8, rows, near|mxfp8, rotated by 32|mxfp8.* before|axes, stoch|token",
    "cuda_linear": "layer|token|FP8 row|step",
    "cuda_decode": "INT4 weights.*= 16|FP8 weights.*= 1$|zp|bf16",
    "cuda_models": "MiniLM, INT8",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tried under the interpreter")
@pytest.mark.parametrize("name", TRIED)
def test_scripts_run_in_a_try(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    script = importlib.import_module(f"benchmarks.{name}").SCRIPT
    assert cuda_harness.main(script, ["--smoke", "--only", TRIED[name]]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"# {script.title}\n") and "| ours" in said
    assert "the row |" not in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRIED)
def test_rows_have_names_of_their_own_and_known_bounds(name):
    script = importlib.import_module(f"benchmarks.{name}").SCRIPT
    names = [row.name for row in script.rows(False)]
    assert len(set(names)) == len(names) and any(row.bounds for row in script.rows(False))
    assert script.name == name


def test_without_a_device_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_harness.main(troubled_rows.SCRIPT, ["--only", "none"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_a_row_that_dies_or_hangs_costs_no_other(tmp_path):
    script = troubled_rows.SCRIPT
    results = harness.Results("troubled_rows", tmp_path)
    cuda_harness.measure_all(script, script.rows(True),
                             cuda_harness.options_of(script, ["--smoke"]), results,
                             time.monotonic() + 100)
    found = results.sections
    assert found["good"]["figures"] == {"rate": [2.0, 1.0, 3.0]}
    assert "ZeroDivisionError" in found["good"]["refused"]["peer"]
    assert found["fails"]["error"] == "ValueError: no such thing"
    assert found["skipped"]["skipped"] == "not installed"
    assert found["dies"]["error"] == "exit status 9: out of luck"
    assert found["hangs"]["error"] == "no result within 0.5 s"
    assert [name for name, row in found.items() if not cuda_harness.is_good(row)] == [
        "fails", "dies", "missed", "hangs"]
    text = cuda_harness.table(script, found, {})
    assert "| good | rate | 2 [1–3] | ≥ 1.5 | yes |" in text
    assert "| missed | rate | 2 [1–3] | ≥ 2.5 | **NO** |" in text
    assert "| good | peer | ZeroDivisionError" in text
    assert "| dies | the row | exit status 9: out of luck |" in text


def test_rows_that_come_too_late_are_said_to_be(tmp_path):
    script = troubled_rows.SCRIPT
    results = harness.Results("late", tmp_path)
    options = cuda_harness.options_of(script, ["--smoke", "--seconds", "0"])
    cuda_harness.measure_all(script, script.rows(True), options, results, time.monotonic())
    assert {row["error"] for row in results.sections.values()} == {"not begun: 0 s were over"}


def test_instructions_of_the_longest_loop():
    assert kernel_instructions.counted("""
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   FADD R0, R0, R1 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   FADD R0, R0, R1 ;
        /*0040*/                   FMUL R0, R0, R1 ;
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/               @P1 BRA `(.L_x_2) ;
.L_x_2:
        /*0070*/                   EXIT ;
    """) == (8, 3)


def test_hot_kernels_are_among_the_builds():
    found = {build.name for build, _, _ in kernel_instructions.hot()}
    assert all(any(re.fullmatch(name, each) for each in found) for name in kernel_instructions.HOT)


def test_figures_are_of_the_same_round():
    found = cuda_timing.Measured({"ours": (1.0, 2.0), "copy": (2.0, 4.0)}, {}, {}, {})
    assert found.faster("ours", "copy") == [2.0, 2.0, 2.0]
    assert found.faster("ours", "missing") is None
    assert found.share("ours", 3.0, "copy", 12.0) == [0.5, 0.5, 0.5]
    assert found.rate("ours", 4.0) == [3.0, 2.5, 3.5]
    assert cuda_timing.quartiles([5.0]) == [5.0, 5.0, 5.0]
