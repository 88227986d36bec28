"""Measurements written, read back and drawn."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.monitors import (
    CsvWriter,
    GradientRecord,
    Measurement,
    OperandRecord,
    TensorBoardWriter,
    plot_scales,
    read_csv,
)
from scaleprop.monitors.plots import exponent_shares


def measurement(step: int, *exponents: dict[int, int], sqnr_db: float = 20.0) -> Measurement:
    operands = tuple(OperandRecord(
        layer=f"layers.{index}.weight, \"a\"", role="fprop.w", format="nvfp4", amax=0.1 + index,
        rms=1 / 3, underflow=0.25, saturated=0.0, sqnr_db=sqnr_db, bias=-1e-30, exponents=each,
        flipped=None if step == 1 else 0.5, oscillation=None)
        for index, each in enumerate(exponents))
    return Measurement(step=step, operands=operands, gradients=(
        GradientRecord(parameter="layers.0.weight", cosine=0.1 + 0.2, norm_ratio=math.inf),))


RUN = [measurement(1, {-7: 3, -6: 1}, {-5: 4}), measurement(3, {-4: 8}, {}, sqnr_db=math.inf)]


def test_csv_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    for each in RUN:  # a run that is resumed goes on in the same file
        writer = CsvWriter(path)
        writer.write(each)
        writer.close()
    assert read_csv(path) == RUN
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "1", "1", "3", "3", "3"]
    assert rows[0]["exponents"] == "-7:3 -6:1"
    assert rows[2]["role"] == "gradient" and rows[2]["format"] == ""


def test_csv_keeps_what_is_not_a_number(tmp_path: Path) -> None:
    CsvWriter(tmp_path / "run.csv").write(measurement(1, {}, sqnr_db=math.nan))
    assert math.isnan(read_csv(tmp_path / "run.csv")[0].operands[0].sqnr_db)


def test_another_file_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("step,loss\n1,2\n")
    for act in (CsvWriter, read_csv):
        with pytest.raises(ConfigError, match=r"columns step, loss, not .* Remedy: another file"):
            act(path)
    assert path.read_text() == "step,loss\n1,2\n"
    with pytest.raises(ConfigError, match="is no file"):
        read_csv(tmp_path / "none.csv")


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    """Before a run, not at its first measurement."""
    for path in (tmp_path / "missing" / "run.csv", tmp_path):
        with pytest.raises(ConfigError, match="cannot write"):
            CsvWriter(path)
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the folder"):
        TensorBoardWriter(tmp_path / "file")


@pytest.mark.parametrize("end", ["5,layer,fprop.w,nvfp4,0.", "5", "5,layer,gradient,,,"])
def test_a_row_that_was_cut_short_is_refused(end: str, tmp_path: Path) -> None:
    CsvWriter(tmp_path / "run.csv").write(RUN[0])
    with (tmp_path / "run.csv").open("a") as file:
        file.write(end)
    with pytest.raises(ConfigError, match="row 5 is cut short"):
        read_csv(tmp_path / "run.csv")


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorBoardWriter(tmp_path)
    for each in RUN:
        writer.write(each)
    writer.close()
    found = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    layer = RUN[0].operands[0].layer
    scalars = {(event.step, event.value) for event in found.Scalars(f"fprop.w/underflow/{layer}")}
    assert scalars == {(1, 0.25), (3, 0.25)}
    assert [event.step for event in found.Scalars(f"fprop.w/flipped/{layer}")] == [3]
    assert f"fprop.w/oscillation/{layer}" not in found.Tags()["scalars"]
    cosines = found.Scalars("gradient/cosine/layers.0.weight")
    assert [event.value for event in cosines] == pytest.approx([0.3, 0.3])
    histogram = found.Histograms(f"fprop.w/exponents/{layer}")[0].histogram_value
    assert (histogram.num, histogram.sum) == (4, -27)
    counts = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
    assert (counts[-6.5], counts[-5.5]) == (3, 1)


def test_without_tensorboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[monitor\]"'):
        TensorBoardWriter(tmp_path)


def test_shares_are_of_all_layers_of_a_role() -> None:
    assert exponent_shares(RUN) == {
        "fprop.w": {1: {-7: 3 / 8, -6: 1 / 8, -5: 1 / 2}, 3: {-4: 1.0}}}


@pytest.mark.parametrize("run", [RUN, RUN[:1]], ids=["two", "one"])
def test_the_plot_has_a_panel_a_role(run: list[Measurement], tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_scales(run, tmp_path / "scales.svg")
    root = ElementTree.parse(tmp_path / "scales.svg").getroot()
    words = {"".join(each.itertext()).strip() for each in root.iter() if each.tag.endswith("text")}
    assert {"fprop.w", "step", "⌊log₂ scale⌋", "share of blocks"} <= words


def test_plots_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scales were measured"):
        plot_scales([], tmp_path / "scales.svg")
    with pytest.raises(ConfigError, match=r"drawn as \.svg, \.png, \.pdf, not as"):
        plot_scales(RUN, tmp_path / "scales.gif")
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="cannot write"):
        plot_scales(RUN, tmp_path / "missing" / "scales.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[report\]"'):
        plot_scales(RUN, tmp_path / "scales.svg")
