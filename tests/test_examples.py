"""Every example is short, listed, and run; what it prints is what it measured."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

from examples import fp4_sweep, quickstart, smooth_and_rotate, vision

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text()
EXAMPLES = re.findall(r"^\| `python -m examples\.(\w+)` \|", README, re.MULTILINE)
# those that are not called below, and the tests that call them
RUN_BY = {
    "serve": "tests/test_serving.py",
    "train_lm": "tests/test_train_lm.py",
    "train_loop": "tests/adapters/test_examples.py",
    "train_hf_trainer": "tests/adapters/test_examples.py",
    "train_lightning": "tests/adapters/test_examples.py",
    "train_accelerate": "tests/adapters/test_examples.py",
    "train_ddp": "tests/distributed/test_example.py",
    "train_fsdp2": "tests/distributed/test_example.py",
}


def test_the_list_is_the_folder() -> None:
    helpers = re.findall(r"`(\w+)\.py`", README)
    assert len(set(EXAMPLES + helpers)) == len(EXAMPLES + helpers)
    files = {path.stem for path in FOLDER.glob("*.py")}
    assert set(EXAMPLES + helpers) == files - {"__init__"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_say_how_to_run_them(name: str) -> None:
    source = (FOLDER / f"{name}.py").read_text()
    assert source.count("\n") < 80
    said = ast.get_docstring(ast.parse(source))
    assert said and f"-m examples.{name}" in said and "--short" in said
    assert callable(importlib.import_module(f"examples.{name}").main)


def test_every_example_is_run_by_a_test() -> None:
    here = {"quickstart", "smooth_and_rotate", "vision", "fp4_sweep"}
    assert here | set(RUN_BY) == set(EXAMPLES)
    for name, path in RUN_BY.items():
        source = (ROOT / path).read_text()
        assert re.search(rf"\b{name}\b", source) and '"--short"' in source


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = quickstart.main(["--short", "--out", str(tmp_path)])
    assert found["int8-dynamic"] > 30 > found["mxfp4"] > 15
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "block.onnx", "saved"}
    assert "int8-dynamic" in capsys.readouterr().out


def test_smoothing_and_rotation_help_a_custom_architecture(tmp_path: Path) -> None:
    found = smooth_and_rotate.main(["--short", "--out", str(tmp_path)])
    assert found["smooth, rotate"] > found["rounding alone"] + 1.5
    assert (tmp_path / "smooth-rotate.html").stat().st_size > 10_000


def test_vision_keeps_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = vision.main(["--short", "--out", str(tmp_path)])
    assert found["float32"] > 90
    assert found["int8"] > found["float32"] - 1 and found["int4-everywhere"] > found["float32"] - 3
    small, large = (tmp_path / f"{name}.onnx" for name in ("int4-everywhere", "int8"))
    assert small.stat().st_size < 0.8 * large.stat().st_size
    assert capsys.readouterr().out.count("%") == 4


def test_the_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    arguments = ["--short", "--out", str(tmp_path)]
    found = fp4_sweep.main(arguments)
    shown = capsys.readouterr().out
    again = fp4_sweep.main(arguments)  # from what it kept
    assert [point.loss for point in again.points] == [point.loss for point in found.points]
    assert "mxfp4" in shown and "nvfp4" in shown
    assert {path.name for path in tmp_path.iterdir()} >= {"table.csv", "page.html", "short.sqlite"}
