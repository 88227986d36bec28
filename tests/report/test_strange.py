"""Reports of strange origin: names that want to be markup, numbers that are none, damaged files."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.cli import main
from scaleprop.cli.app import run
from scaleprop.errors import ConfigError
from scaleprop.recipes import Recipe, Role
from scaleprop.report import Report, ScaleReport
from scaleprop.report.outliers import AttentionProfile, Outlier, OutlierTable, Profile
from scaleprop.report.records import TensorRecord
from tests.report.pages import training_report

SCRIPT = '"><script>alert(1)</script>'


def record(**fields: Any) -> TensorRecord:
    given: dict[str, Any] = dict(
        node="mm", op="aten.linear", operand="w", role="fprop.x", shape=(4, 8), module="a",
        decided_by="p", format="mxfp4", scale_kind="dynamic", sqnr_db=20.0, lowering="a matmul")
    return TensorRecord(**given | fields)


def profile(**fields: Any) -> Profile:
    given: dict[str, Any] = dict(
        node="x", op="aten.relu", source="m.py:1", reader="mm", layer="linear", channels=2,
        amax=(1.0, 2.0), outliers=(), kurtosis=3.0, channel_kurtosis=3.0, difficulty=0.5,
        relative_difficulty=0.5)
    return Profile(**given | fields)


def with_profiles(*profiles: Profile) -> Report:
    return Report(records=(record(),), outliers=OutlierTable(profiles=profiles))


def test_no_name_of_a_chart_becomes_markup(tmp_path: Path) -> None:
    report = with_profiles(profile(layer=SCRIPT, node=SCRIPT, reader=SCRIPT))
    report.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page


def test_outliers_that_are_no_numbers_come_back(tmp_path: Path) -> None:
    odd = OutlierTable(
        outliers=(Outlier(kind="weight row", node="w", op="", source="", indices=(1,),
                          sizes=(math.inf,), shares=(1.0,), count=1),),
        profiles=(profile(amax=(math.inf, 1.0), relative_after=math.nan, after=math.inf),
                  profile(amax=(math.nan, 1.0))),
        attention=(AttentionProfile(node="a", source="", keys=2, received=(math.nan, 1.0),
                                    value_norms=(math.inf, 1.0)),))
    Report(records=(record(),), outliers=odd).save(tmp_path / "odd.json")
    read = Report.load(tmp_path / "odd.json")
    assert repr(read.outliers) == repr(odd)  # NaN is not equal to itself
    read.save(tmp_path / "odd.html")
    read.show()


def test_what_utf8_has_no_bytes_for_is_a_question_mark(tmp_path: Path) -> None:
    report = Report(records=(record(node="a\udce9", source="/x/\udce9.py:3"),), notes=("\udce9",))
    report.save(tmp_path / "page.html")
    assert 'id="t=a?:w"' in (tmp_path / "page.html").read_text(encoding="utf-8")
    report.save(tmp_path / "page.json")
    assert Report.load(tmp_path / "page.json") == report


def damaged(change: Callable[[dict[str, Any]], Any]) -> str:
    data = Report(records=(record(),), nbytes_after=20, fidelity={"cosine": 1.0}).to_dict()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 100_000, "cannot read the report"),
    (damaged(lambda d: d["records"][0].update(sqnr_db=10**400)), r"records\[0\]\.sqnr_db is 1000"),
    (damaged(lambda d: d["fidelity"].update(cosine=-(10**400))), r"fidelity\.cosine is -1000"),
    (damaged(lambda d: d.update(nbytes_after=10**400)), "nbytes_after is 1000"),
], ids=["nested", "decibels", "fidelity", "bytes"])
def test_damage_that_no_number_or_stack_holds_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        Report.load(tmp_path / "bad.json")
    if text.startswith("["):
        with pytest.raises(ConfigError, match=message):
            ScaleReport.load(tmp_path / "bad.json")


def test_scale_reports_with_numbers_beyond_floats_are_refused() -> None:
    data = training_report().to_dict()
    data["tensors"][0]["rms"] = 10**400
    with pytest.raises(ConfigError, match=r"tensors\[0\]\.rms is 1000"):
        ScaleReport.from_dict(data)


@pytest.mark.parametrize(("field", "value", "said"), [
    ("shape", (4, 9), "4×8 → 4×9"), ("scale_kind", "static", "dynamic → static"),
    ("lowering", "a slow matmul", "a matmul → a slow matmul"),
])
def test_diff_sees_shapes_kinds_of_scales_and_what_runs(
    field: str, value: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Report(recipe="r", records=(record(),))
    new = Report(recipe="r", records=(record(**{field: value}),))
    found = old.diff(new)
    assert [one.fields for one in found.tensors] == [(field,)]
    found.show()
    assert said in capsys.readouterr().out
    json.dumps(found.to_dict())
    alone = Report(recipe="r").diff(new)
    alone.show()
    assert "–;" not in capsys.readouterr().out
    analysis = dataclasses.replace(old, recipe=None)
    numbers = dataclasses.replace(new, recipe=None)
    assert bool(analysis.diff(numbers)) == (field != "lowering")


def test_values_whose_squares_are_infinite_have_no_prediction() -> None:
    model = nn.Linear(8, 8).double().eval()
    compiled = scaleprop.compile(model, (torch.full((2, 8), 1e200, dtype=torch.float64),),
                                 "mxfp4", "reference")
    scales = compiled.report.measured().scales
    assert scales is not None and scales.unknown and scales.tensors[-1].predicted is None


def test_provenance_says_what_is_calibrated_and_what_is_not() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(name="t", description="", source="", roles={
        "fprop.w": Role(format="mxfp8", rounding="compensated"),
        "fprop.x": Role(format="nvfp4", scaling="static")})
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU()).eval()
    found = scaleprop.compile(model, (x,), recipe, "reference", calibration=[x, x]).report.records
    said = {one.role: one.provenance for one in found}
    weight, static = said["fprop.w"], said["fprop.x"]
    assert weight is not None and static is not None and weight.batches == static.batches == 2
    assert weight.statistic == "amax of each 1×32 block as earlier columns' errors left it"
    assert static.statistic == ("amax of each 1×16 block, at run time, under one of the tensor: "
                                "min and max of calibration")


def test_the_command_line_reads_reports_of_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = training_report()
    report.save(tmp_path / "step.json")
    report.save(tmp_path / "direct.html")
    assert run(["report", "show", str(tmp_path / "step.json")]) == 0
    assert "residual-growth" in capsys.readouterr().out
    assert run(["report", "html", str(tmp_path / "step.json"), "-o", str(tmp_path / "a.html")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "direct.html").read_bytes()
    data = report.to_dict()
    data["tensors"][1]["op"] = 5
    (tmp_path / "bad.json").write_text(json.dumps(data))
    assert run(["report", "show", str(tmp_path / "bad.json")]) == 2
    assert re.search(r"bad\.json.*tensors\[1\]\.op is 5", capsys.readouterr().err)


def test_signs_that_a_terminal_lacks_are_question_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Report(recipe="r", records=(record(node="a\udce9→"),)).save(tmp_path / "r.json")
    for encoding in ("ascii", "utf-8"):
        written = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
        assert main(["report", "show", str(tmp_path / "r.json")]) == 0
        sys.stdout.flush()
        assert b"a?" in written.getvalue()
