"""``scaleprop sweep``: a TOML file in, tables and files out."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scaleprop.cli import main
from scaleprop.cli.sweep import read
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import Operand
from scaleprop.sweeps import Sweep

CONFIG = """
factory = "tests.sweep.tiny:factory"
data = "tests.sweep.tiny:data"
validation = "tests.sweep.tiny:held_out"
recipe = {operands = {"fprop.x" = {format = "mxfp8"}, "fprop.w" = {format = "mxfp8"}}, high = []}
steps = 3
learning_rate = 0.01
options = {inner = "eager"}

[axes]
"*.format" = ["mxfp8", "mxfp4", "mxfp9"]
rotation.none = {"*.hadamard" = 0}
rotation.16 = {"*.hadamard" = 16, "*.signs" = "fixed"}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def test_a_sweep_from_a_file(config: Path, capsys: pytest.CaptureFixture[str]):
    given = ["sweep", str(config), "--csv", "out.csv", "--plot", "out.html", "--markdown", "out.md"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "bf16 (baseline)" in printed and "mxfp4" in printed and "wrote out.html" in printed
    assert "skipped, *.format=mxfp9, rotation=none: unknown format 'mxfp9'" in printed
    with Path("out.csv").open(newline="") as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    assert kinds == ["baseline", *["combination"] * 4, *["skipped"] * 2]
    assert Path("out.md").read_text() == Sweep.load("sweep.sqlite").table()
    assert "</html>" in Path("out.html").read_text()
    assert main(["sweep", "--show", "sweep.sqlite", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["runs"] for entry in shown["combinations"]] == ["1 of 1"] * 4
    assert len(shown["skipped"]) == 2 and shown["settings"]["steps"] == 3
    assert main(["sweep", str(config), "--json", "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == shown, "all runs were there"


def test_runs_that_fail_have_an_exit_status(config: Path, capsys: pytest.CaptureFixture[str]):
    config.write_text('optimizer = "tests.sweep.tiny:broken"\n' + CONFIG)
    assert main(["sweep", str(config), "--path", "other.sqlite", "--fresh"]) == 1
    assert "no optimizer today" in capsys.readouterr().out
    assert Path("other.sqlite").exists() and not Path("sweep.sqlite").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "takes a .toml file, or --show"), (["config.toml", "--show", "x"], "takes a .toml file"),
    (["missing.toml"], "cannot read 'missing.toml'"), (["--show", "none.sqlite"], "no sweep"),
    (["config.toml", "--plot", "x.pdf"], "drawn as .svg, .png, .html"),
    (["config.toml", "--csv", "missing/x.csv"], "create the folder 'missing'"),
    (["config.toml", "--plot", "missing/x.html"], "create the folder 'missing'"),
    (["config.toml", "--markdown", "."], "it is a folder"),
    (["config.toml", "--jobs", "0"], "a number of processes"),
])
def test_what_is_refused(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["sweep", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("sweep.sqlite").exists(), "before anything is run"


def test_pictures_are_refused_before_hours_of_training(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["sweep", str(config), "--plot", "x.svg"]) == 2
    assert 'pip install "scaleprop[report]"' in capsys.readouterr().err
    assert not Path("sweep.sqlite").exists()


def test_a_factory_that_raises_is_refused_by_name(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    config.write_text(CONFIG.replace("tiny:factory", "tiny:unmade"))
    assert main(["sweep", str(config)]) == 2
    assert "RuntimeError: no model today" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("factory = ", "cannot read"), ("colour = 1\n" + CONFIG, "called colour; known: factory"),
    ("progress = true\n" + CONFIG, "called progress"),
    ('data = "a:b"', "does not say factory, recipe, axes"),
    (CONFIG.replace("fprop.x", "fprop.q"), r"unknown roles \['fprop.q'\]"),
    (CONFIG.replace("high = []", "tall = []"), "not a training recipe.*tall"),
])
def test_files_that_make_no_sense(config: Path, text: str, message: str):
    config.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(config)


def test_what_a_file_says(config: Path):
    config.write_text('baseline = "none"\nseeds = [3, 4]\n' + CONFIG)
    found: dict[str, Any] = read(config)
    assert found["baseline"] is None and found["seeds"] == [3, 4]
    assert found["recipe"].operands["fprop.x"] == Operand(format="mxfp8")
