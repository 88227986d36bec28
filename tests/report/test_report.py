"""The report: JSON round trip, one offline HTML file, a table, and clear errors."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import stat
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.report import (
    SCHEMA_VERSION,
    Report,
    TensorRecord,
    outliers_charts,
    outliers_table,
    text,
)
from scaleprop.report.outliers import AttentionProfile, Outlier, OutlierTable, Profile, grouped
from tests.report.pages import full_report, large_report, training_report

HOSTILE = "</script><script>alert('x')</script>$\\frac"


def make_report() -> Report:
    weight = TensorRecord(
        node="fc", op="aten.linear", operand="weight", role="fprop.w", shape=(8, 4),
        decided_by="assign-formats", format="mxfp4", scale_kind="weight", sqnr_db=18.25,
        saturated=0.0, underflowed=0.125, nbytes=20, nbytes_high=128,
        lowering="integer limbs", source="/home/someone/project/model.py:12 in forward",
    )
    return Report(
        recipe="mxfp4", backend="onnxruntime", nbytes_before=1000, nbytes_after=160,
        fidelity={"cosine": 0.99}, notes=("a note",),
        records=(
            weight,
            TensorRecord(node="fc", op="aten.linear", operand="input", role="fprop.x",
                         shape=("b", 4), decided_by="assign-formats", format="mxfp4",
                         scale_kind="dynamic", sqnr_db=math.inf, saturated=2e-5),
            TensorRecord(node=HOSTILE, op="aten.conv2d", operand="weight", role="other",
                         shape=(), decided_by="exclude", reason="excluded by exclude='<conv>'",
                         nbytes=64, nbytes_high=64, sqnr_db=math.nan),
        ),
    )


def same(left: Report, right: Report) -> bool:
    return json.dumps(left.to_dict()) == json.dumps(right.to_dict())  # NaN compares as text


def test_json_round_trip(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path / "r.json")
    loaded = Report.load(tmp_path / "r.json")
    assert same(loaded, report)
    assert loaded.records[:2] == report.records[:2]
    assert loaded.records[1].shape == ("b", 4)
    assert loaded.records[1].sqnr_db == math.inf


def test_json_is_strict_and_versioned() -> None:
    data = json.loads(json.dumps(make_report().to_dict(), allow_nan=False))
    assert (data["schema"], data["schema_version"]) == ("scaleprop.report", SCHEMA_VERSION)
    assert [r["sqnr_db"] for r in data["records"]] == [18.25, "inf", "nan"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "version 99; this version reads"),
        ({"schema": "other"}, "'other'"),
        ({"surprise": 1}, "surprise"),
        ({"records": [{"node": "x"}]}, "shape"),
        ({"records": None}, "not a report"),
        ({"fidelity": {"cosine": "high"}}, "high"),
    ],
)
def test_from_dict_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Report.from_dict({**make_report().to_dict(), **change})


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_load_refuses_other_files(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"r\.json"):
        Report.load(path)
    with pytest.raises(ConfigError, match="absent"):
        Report.load(tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.html or \.json"):
        make_report().save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_unwritable_path_is_named(tmp_path: Path) -> None:
    target = tmp_path / "missing" / "report.html"
    with pytest.raises(ConfigError, match="missing") as caught:
        make_report().save(target)
    assert "create the folder" in str(caught.value)
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="it is a folder"):
        make_report().save(tmp_path / "folder.json")


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigError, match="No space left"):
        make_report().save(path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_saved_files_follow_the_umask(tmp_path: Path) -> None:
    make_report().save(tmp_path / "r.json")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "r.json").stat().st_mode) == 0o666 & ~mask


class Page(HTMLParser):
    """Collects the elements, the text and every attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_offline_file(tmp_path: Path) -> None:
    make_report().save(tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(source)
    loads = {value for name, value in page.attributes if name in ("src", "href", "action")}
    assert not {value for value in loads if value and not value.startswith("#")}
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp", source)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'") in page.attributes


def test_html_escapes_every_name(tmp_path: Path) -> None:
    report = make_report()
    hostile = [
        TensorRecord(node=HOSTILE, op=HOSTILE, operand=HOSTILE, role="other", shape=(HOSTILE,),
                     decided_by=HOSTILE, reason=HOSTILE, format=fmt, source=HOSTILE,
                     lowering=HOSTILE, sqnr_db=1.0, nbytes=8, scale_kind="weight")
        for fmt in (None, HOSTILE)
    ]
    Report(recipe=HOSTILE, backend=HOSTILE, records=tuple(hostile), notes=(HOSTILE,),
           fidelity={HOSTILE: 1.0}).save(tmp_path / "r.html")
    report.save(tmp_path / "plain.html")
    tags = Page((tmp_path / "r.html").read_text()).tags
    assert tags.count("script") == Page((tmp_path / "plain.html").read_text()).tags.count("script")
    assert HOSTILE in Page((tmp_path / "r.html").read_text()).text


def test_html_shows_every_record_and_reason(tmp_path: Path) -> None:
    make_report().save(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    for expected in ("mxfp4", "integer limbs", "project/model.py:12 in forward", "b×4", "exact",
                     "12.50", "excluded by exclude='<conv>'", "a note", "0.160× of 1.0 kB"):
        assert expected in page.text
    assert page.tags.count("button") == 14  # every column with anything in it sorts


def test_html_does_not_show_where_the_user_lives(tmp_path: Path) -> None:
    make_report().save(tmp_path / "r.html")
    assert "someone" not in (tmp_path / "r.html").read_text()


def test_charts_have_unique_identifiers(tmp_path: Path) -> None:
    make_report().save(tmp_path / "r.html")
    found = re.findall(r'\bid="([^"]+)"', (tmp_path / "r.html").read_text())
    assert len(found) == len(set(found))


def test_html_without_matplotlib_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers_table, "matplotlib_is_installed", lambda: False)
    dataclasses.replace(make_report(), outliers=outlier_table()).save(tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert "svg" not in page.tags
    assert 'pip install "scaleprop[report]"' in page.text


def test_an_empty_report_saves_and_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Report().save(tmp_path / "r.html")
    assert "no tensors" in (tmp_path / "r.html").read_text()
    Report(recipe="int8").show()
    assert "tensors: 0 of 0" in capsys.readouterr().out


def test_an_analysis_counts_tensors_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    weight, activation = make_report().records[:2]
    other = dataclasses.replace(weight, format="nvfp4")
    Report(records=(weight, other, activation)).show()
    assert "tensors: 2 in 2 formats" in capsys.readouterr().out


def test_show_names_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    make_report().show()
    shown = capsys.readouterr().out
    for expected in ("mxfp4", "tensors: 2 of 3", "0.160×", "18.2", "12.50", "integer limbs",
                     "1 × aten.conv2d: excluded by exclude='<conv>'", "a note", "cosine"):
        assert expected in shown


def test_show_without_rich_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(BackendUnavailable, match=r"scaleprop\[cli\]"):
        make_report().show()


def test_reasons_are_counted() -> None:
    record = make_report().records[2]
    report = Report(records=(record, record, make_report().records[0]))
    assert report.reasons() == [("aten.conv2d", "excluded by exclude='<conv>'", 2)]
    assert report.size_ratio is None


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "?"), (17, "17 B"), (4500, "4.5 kB"), (2_300_000, "2.3 MB")]
)
def test_megabytes(value: int | None, shown: str) -> None:
    assert text.megabytes(value) == shown


@pytest.mark.parametrize(
    ("share", "shown"), [(None, ""), (0.0, "0"), (5e-5, "<0.01"), (0.125, "12.50"), (1.0, "100.00")]
)
def test_percent(share: float | None, shown: str) -> None:
    assert text.percent(share) == shown


def outlier_table(channels: int = 600, many: int = 1) -> OutlierTable:
    """Of an activation with two outlier channels, a weight and a sink; every name is hostile."""
    amax = [1.0 + i / channels for i in range(channels)]
    amax[37] = amax[channels - 1] = 80.0
    profile = Profile(
        node=f"act {HOSTILE}", op=HOSTILE, source=HOSTILE, reader="fc", layer="linear",
        channels=channels, amax=grouped(amax), outliers=(37, channels - 1), kurtosis=900.0,
        channel_kurtosis=3.1, difficulty=12.0, relative_difficulty=2.5, after=3.0,
        relative_after=0.25)
    outlier = Outlier(kind="activation channel", node=f"act {HOSTILE}", op="aten.add", detail="why",
                      source="/home/someone/project/model.py:3 in forward", indices=(37, 599),
                      sizes=(80.0, 41.5), shares=(1.0, 0.125), count=10)
    sink = AttentionProfile(node="attention", source="m.py:1", keys=20,
                            received=(0.7, *(0.3 / 19,) * 19), value_norms=(0.1, *(1.0,) * 19))
    constant = dataclasses.replace(profile, node="constant", kurtosis=math.nan, outliers=(),
                                   channel_kurtosis=math.nan, relative_difficulty=math.nan)
    return OutlierTable(outliers=(outlier,) * many, profiles=(profile,) * many + (constant,),
                        attention=(sink,) * many, notes=("too short",))


def test_outliers_survive_json(tmp_path: Path) -> None:
    report = dataclasses.replace(make_report(), outliers=outlier_table())
    report.save(tmp_path / "r.json")
    assert same(Report.load(tmp_path / "r.json"), report)
    loaded = Report.load(tmp_path / "r.json").outliers
    assert loaded is not None and loaded.outliers == outlier_table().outliers
    assert math.isnan(loaded.profiles[1].kurtosis)
    assert "outliers" not in make_report().to_dict()
    with pytest.raises(ConfigError, match="not a report"):
        Report.from_dict({**make_report().to_dict(), "outliers": {"outliers": [{"no": 1}]}})


def test_outliers_are_shown_with_pictures(tmp_path: Path) -> None:
    report = dataclasses.replace(make_report(), outliers=outlier_table())
    report.save(tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text()
    page = Page(source)
    for expected in ("37 (80×, 100.00%), 599 (41.5×, 12.50%)", "project/model.py:3 in forward",
                     "and 8 more", "900", "0.25", "too short", "with 2 outliers marked",
                     "Kurtosis of the 1", HOSTILE):
        assert expected in page.text
    assert page.tags.count("svg") == 4
    assert "someone" not in source and "image" not in page.tags and "mathdefault" not in source
    found = re.findall(r'\bid="([^"]+)"', source)
    assert len(found) == len(set(found))
    Report(outliers=OutlierTable()).save(tmp_path / "bare.html")
    assert "No channel, token, weight or attention stands" in (tmp_path / "bare.html").read_text()


def test_pictures_of_outliers_are_bounded(tmp_path: Path) -> None:
    sizes: list[int] = []
    for many in (12, 200):
        table = outlier_table(channels=20_000, many=many)
        assert len(table.profiles[0].amax) <= 256
        sizes.append(sum(len(chart.svg) for chart in outliers_charts.charts(table)))
    assert sizes[1] < 1.05 * sizes[0] and sizes[1] < 300_000


def test_a_profile_keeps_the_largest_of_neighbours() -> None:
    assert grouped([1, 5, 2, 3, 9, 4, 7], limit=3) == (5, 9, 7)
    assert grouped([1, 5, 2], limit=3) == (1, 5, 2)


def test_the_sink_map_lays_positions_over_each_other() -> None:
    short = AttentionProfile(node="a", source="", keys=4, received=(1, 2, 3, 4), value_norms=())
    long = AttentionProfile(node="b", source="", keys=16, received=(8, 7, 6, 5), value_norms=())
    assert outliers_charts.cells_of(short, 16, 8) == [2, 4, 0, 0, 0, 0, 0, 0]
    assert outliers_charts.cells_of(long, 16, 8) == [8, 0, 7, 0, 6, 0, 5, 0]  # of four keys each


def test_outliers_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Report(outliers=outlier_table(many=20)).show()
    shown = capsys.readouterr().out
    for expected in ("activation", "37 (80×,", "and 4 more kinds of outliers", "0.25",
                     "and 5 more activations"):
        assert expected in shown
    Report(outliers=OutlierTable()).show()
    assert "relative" not in capsys.readouterr().out


@pytest.mark.parametrize("backward", [False, True])
def test_a_page_of_32_layers_is_less_than_a_megabyte(tmp_path: Path, backward: bool) -> None:
    report = large_report(32, backward)
    assert len(report.records) == 32 * (7 * 2 + 4)
    report.save(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 1_000_000


def test_the_page_of_a_step_of_32_layers_is_less_than_a_megabyte(tmp_path: Path) -> None:
    step = training_report()
    copies = 1 + 4000 // len(step.tensors)
    dataclasses.replace(step, tensors=tuple(
        dataclasses.replace(tensor, node=f"{tensor.node}_{i}")
        for i in range(copies) for tensor in step.tensors)).save(tmp_path / "step.html")
    assert 100_000 < (tmp_path / "step.html").stat().st_size < 1_000_000


def page_data(path: Path) -> dict[str, Any]:
    """The JSON that a page carries."""
    (found,) = re.findall('<script type="application/octet-stream" id="data">(.*?)</script>',
                          path.read_text(encoding="utf-8"))
    return json.loads(zlib.decompress(base64.b64decode(found)))


def test_the_page_carries_what_was_measured(tmp_path: Path) -> None:
    report = full_report()
    report.save(tmp_path / "r.html")
    data = page_data(tmp_path / "r.html")

    def column(name: str) -> list[Any]:
        found = data["tensors"][name]
        return found if isinstance(found, list) else [found["of"][place] for place in found["at"]]

    assert report.scales is not None
    assert data["rows"] == len(report.records)
    assert len(data["ids"]) == len(set(data["ids"])) == data["rows"] + len(report.scales.tensors)
    for index, record in enumerate(report.records[:-1]):
        assert column("operand")[index] == record.operand
        assert record.values is not None
        assert column("rms")[index] == pytest.approx(record.values.rms, rel=1e-3)
        first, *parts = column("exponents")[index]
        assert first == min(record.values.exponents) and min(parts) >= 1
        total = sum(record.values.exponents.values())
        for exponent, count in record.values.exponents.items():
            assert parts[exponent - first] == pytest.approx(max(1, 1e5 * count / total), abs=0.5)
    assert (column("rms")[36], column("amax")[36], column("sqnr")[36]) == \
        ("Infinity", "NaN", "Infinity")
    assert data["formats"] == {"mxfp4": [0.5, 1, 6, 4, "e2m1", "1×32", "e8m0"]}
    assert data["plain"]["e4m3"][:4] == [2**-9, 2**-6, 448, 8]
    assert [(part["title"].split(":")[0], len(part["items"])) for part in data["depth"]] == \
        [("Forward", 28), ("Backward", 16), ("Weights", 14)]
    linked = [(column("node")[i], column("operand")[column("record")[i]])
              for i in range(data["rows"], len(data["ids"])) if column("record")[i] is not None]
    assert linked and all(node == operand for node, operand in linked)


def test_transforms_show_before_and_after(tmp_path: Path) -> None:
    full_report().save(tmp_path / "r.html")
    text = Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    assert "kurtosis 81 → 4.1; sqnr_db 11.2 → 18.9" in text and "smooth → gptq" in text
    assert "int8" in text and "2.31×" in text  # recipes side by side
    speed = "speed: median time of the model that was given ÷ that of the compiled one"
    assert speed in text and "cosine: to the model that was given" in text
    slow = tuple(dataclasses.replace(each, speed=None) for each in full_report().variants)
    dataclasses.replace(full_report(), variants=slow).save(tmp_path / "r.html")
    assert speed not in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
