"""What reports say of tensors' numbers, against numpy; real reports, against the schema."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.analysis import analyze
from scaleprop.analysis.recipes import compare_recipes
from scaleprop.cli.app import run
from scaleprop.errors import ConfigError
from scaleprop.passes.statistics import Measured
from scaleprop.report import Report, ScaleReport
from scaleprop.report import schema as schemas
from scaleprop.report.ranges import range_of
from scaleprop.report.records import ScaleProvenance, TensorRecord, TransformRecord, Values


class Small(nn.Module):
    """A table, a norm, linears and a convolution; one channel of the norm stands out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.conv = nn.Conv1d(32, 16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.conv(x.transpose(1, 2))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Small:
    torch.manual_seed(0)
    made = Small().eval()
    with torch.no_grad():
        made.norm.weight[3] = 40.0
    return made


@pytest.fixture(scope="module")
def int8(model: Small, ids: torch.Tensor) -> scaleprop.CompiledModel:
    return scaleprop.compile(model, (ids,), "int8", "reference", calibration=[ids, ids, ids])


@pytest.fixture(scope="module")
def smoothed(model: Small, ids: torch.Tensor) -> scaleprop.CompiledModel:
    return scaleprop.compile(model, (ids,), "mxfp4", "reference", passes=["smooth"],
                             calibration=[ids, ids])


def record_of(report: Report, operand: str, role: str) -> TensorRecord:
    return next(r for r in report.records if r.operand == operand and r.role == role)


def exponents(x: Any) -> dict[int, int]:
    live = np.abs(x[np.isfinite(x) & (x != 0)]).astype(np.float64)
    found, counts = np.unique(np.frexp(live)[1] - 1, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_figures_are_those_of_numpy_in_one_piece_and_in_many(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(600_001) ** 3 + 0.25).to(dtype)
    x[:7] = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 6e-8, -6e-8])
    wide = x.double().numpy()
    good = wide[np.isfinite(wide)]
    centred = good - good.mean()
    whole, pieces = Measured.of(x), Measured.of_pieces(x.split(1013))
    for seen in (whole, pieces):
        assert seen.exponents == exponents(wide)
        assert (seen.count, seen.amax) == (600_001, np.abs(good).max())
        assert seen.rms == pytest.approx(math.sqrt((good**2).mean()), rel=1e-12)
        assert seen.mean == pytest.approx(good.mean(), rel=1e-9)
        assert seen.kurtosis == pytest.approx(
            (centred**4).mean() / (centred**2).mean() ** 2, rel=1e-9)
        assert seen.nonfinite == 3 / 600_001
        assert seen.zeros == (good == 0).sum() / 600_001


def test_extreme_and_empty_tensors_have_figures() -> None:
    huge = Measured.of(torch.tensor([1e200, -3e200, 2e200], dtype=torch.float64))
    assert huge.kurtosis == pytest.approx(1.5) and huge.rms == pytest.approx(2.1602e200, rel=1e-4)
    tiny = Measured.of(torch.tensor([2.0**-149, 5e-324], dtype=torch.float64))
    assert tiny.exponents == {-149: 1, -1074: 1}
    empty = Measured.of(torch.zeros(0))
    assert (empty.count, empty.kurtosis, empty.exponents) == (0, None, {})


def test_static_activations_are_measured_against_numpy(
    int8: scaleprop.CompiledModel, ids: torch.Tensor, model: Small
) -> None:
    light = int8.report
    assert all(record.values is None for record in light.records) and light.scales is None
    record = record_of(light.measured(), "layer_norm", "fprop.x")
    rounded = int8.program.module.get_buffer("table.weight_data").double() * \
        int8.program.module.get_buffer("table.weight_scale").double()
    x = model.norm(rounded[ids].float()).detach().double().numpy()
    seen = model.norm(model.table(ids)).detach().double()  # calibration is before rounding
    low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
    values = record.values
    assert values is not None and values.scales is not None
    assert values.scales[0] == values.scales[1] == pytest.approx((high - low) / 255, rel=1e-6)
    assert values.exponents == exponents(x)
    assert values.scaled == exponents(x / values.scales[0])
    assert values.predicted == pytest.approx(values.rms, rel=0.1)  # 2 × 12 tokens are few
    zero = round(-low / values.scales[0])
    restored = (np.clip(np.rint(x / values.scales[0]) + zero, 0, 255) - zero) * values.scales[0]
    noise = ((x - restored) ** 2).sum()
    assert record.sqnr_db == pytest.approx(10 * math.log10((x**2).sum() / noise), abs=0.01)
    assert record.underflowed == ((restored == 0) & (x != 0)).mean()
    assert record.provenance == ScaleProvenance(
        by="quantize-activations", statistic="min and max of calibration", batches=3,
        value="layer_norm")
    assert record.module == "up"


@pytest.mark.parametrize("operand", ["up.weight", "table.weight", "conv.weight"])
def test_weights_are_measured_as_they_are_stored(
    int8: scaleprop.CompiledModel, model: Small, operand: str
) -> None:
    record = next(r for r in int8.report.measured().records if r.operand == operand)
    w = model.get_parameter(operand).detach().flatten(1).double()
    scale = (w.abs().amax(1, keepdim=True) / 127).float().double()
    codes = (w / scale).round().clamp(-127, 127)
    assert record.values is not None
    assert record.values.scaled == exponents(codes.numpy())
    assert record.values.exponents == exponents((codes * scale).float().numpy())
    assert record.values.scales == pytest.approx((float(scale.min()), float(scale.max())))
    assert record.sqnr_db == next(
        r for r in int8.program.records if r.operand == operand).sqnr_db  # as it was


def test_depth_is_measured_and_predicted(int8: scaleprop.CompiledModel) -> None:
    scales = int8.report.measured().scales
    assert scales is not None
    rows = {row.node: row for row in scales.tensors}
    assert rows["relu"].phase == "forward" and "forward" in rows["relu"].read_in
    assert rows["norm_weight"].phase == "parameter" and rows["norm_weight"].amax == 40.0
    assert not [row for row in scales.tensors if row.name.endswith("_scale")]  # stored parts
    share = scales.predicted_within("forward")
    assert share is not None and share > 0.8
    assert {row.module for row in scales.tensors} >= {"up", "down", "norm", "conv"}


def test_transforms_are_compared_with_the_model_that_was_given(
    smoothed: scaleprop.CompiledModel, model: Small, ids: torch.Tensor
) -> None:
    (first, *_) = smoothed.report.measured().transforms
    x = model.norm(model.table(ids)).detach().double().numpy().reshape(-1, 32)
    centred = x - x.mean()
    norms = np.sqrt((x**2).sum(0))
    assert first.before["kurtosis"] == pytest.approx(
        (centred**4).mean() / (centred**2).mean() ** 2, rel=1e-5)
    assert first.before["difficulty"] == pytest.approx(norms.std(ddof=1), rel=1e-5)
    assert first.after["relative_difficulty"] < 0.5 * first.before["relative_difficulty"]
    assert set(first.after) == set(first.before) >= {"sqnr_db"}
    reader = next(r for r in smoothed.report.records if r.node == first.readers[0])
    assert reader.provenance is not None and first.absorbed[0] in (
        *reader.provenance.neighbours, reader.operand)


def test_a_model_that_changed_or_is_gone_is_not_compared(ids: torch.Tensor) -> None:
    for change in ("write", "delete"):
        torch.manual_seed(0)
        own = Small().eval()
        own.table = nn.Embedding(4000, 32)  # large enough not to be kept
        compiled = scaleprop.compile(own, (ids,), "mxfp4", "reference", passes=["smooth"],
                                     calibration=[ids, ids])
        if change == "write":
            with torch.no_grad():
                own.norm.weight.add_(1)
        else:
            del own
            gc.collect()
        (first, *_) = compiled.report.measured().transforms
        assert first.before == {} and first.after["kurtosis"] > 1


def test_saved_models_keep_what_they_know(
    smoothed: scaleprop.CompiledModel, tmp_path: Path
) -> None:
    report = smoothed.report.measured()
    smoothed.save(tmp_path / "saved")
    loaded = scaleprop.load(tmp_path / "saved").report
    assert loaded.transforms == report.transforms and loaded.transforms[0].before
    assert loaded.records == report.records and loaded.scales == report.scales
    assert report.block is loaded.block is None  # no module is there twice


def test_real_reports_fit_the_schema_and_come_back(
    int8: scaleprop.CompiledModel, smoothed: scaleprop.CompiledModel, model: Small,
    ids: torch.Tensor, tmp_path: Path,
) -> None:
    step: Any = analyze(model, (ids,), loss_fn=lambda y: y.square().mean())
    assert isinstance(step, ScaleReport)
    looked = analyze(model, (ids,))
    assert looked.records[0].values is not None and looked.records[0].values.kurtosis is not None
    for index, report in enumerate((int8.report, smoothed.report, looked,
                                    int8.report.with_scales(step))):
        report.save(tmp_path / f"{index}.json")
        data = json.loads((tmp_path / f"{index}.json").read_text(), parse_constant=pytest.fail)
        assert schemas.problem(data) is None
        assert Report.load(tmp_path / f"{index}.json").to_dict() == data
    assert {row.phase for row in step.tensors} >= {"forward", "backward"}
    quantized = int8.report.quantized
    assert set(int8.report.to_dict()["formats"]) == {record.format for record in quantized}


def test_schema_and_records_have_the_same_fields() -> None:
    defs = schemas.report_schema()["$defs"]
    for kind in (TensorRecord, Values, ScaleProvenance, TransformRecord):
        assert set(defs[kind.__name__]["properties"]) == {
            field.name for field in dataclasses.fields(kind)}
    page = Path(__file__).parents[2] / "docs" / "report-schema.md"
    assert page.read_text(encoding="utf-8") == schemas.markdown()


def example() -> Report:
    values = Values(count=4, amax=math.inf, rms=2.0, mean=math.nan, exponents={-3: 1, 0: 2},
                    scaled={1: 3}, scales=(0.5, 1.0))
    record = TensorRecord(
        node="mm", op="aten.linear", operand="w", role="fprop.w", shape=(4, 4), module="a.b",
        decided_by="p", format="mxfp4", sqnr_db=20.0, nbytes=10, values=values,
        provenance=ScaleProvenance(by="p", statistic="amax", neighbours=("x",)))
    other = dataclasses.replace(record, node="mm_1", operand="v", values=None, provenance=None)
    return Report(recipe="mxfp4", backend="reference", records=(record, other), nbytes_after=20)


def test_numbers_that_are_none_survive_json() -> None:
    data = json.loads(json.dumps(example().to_dict(), allow_nan=False))
    written = data["records"][0]["values"]
    assert written["amax"] == "inf" and written["mean"] == "nan"
    assert written["exponents"] == {"first": -3, "counts": [1, 0, 0, 2]}
    read = Report.from_dict(data).records[0].values
    assert read is not None and read.amax == math.inf and math.isnan(read.mean)
    assert read.exponents == {-3: 1, 0: 2} and read.scales == (0.5, 1.0)
    assert data["formats"]["mxfp4"] == {
        "element": "e2m1", "min_subnormal": 0.5, "min_normal": 1.0, "max": 6.0, "bits": 4,
        "block": [1, 32], "scale": "e8m0"}
    assert range_of("mxfp4").exponents == (-1, 2)


def test_version_1_is_read() -> None:
    data = example().to_dict()
    old = {key: value for key, value in data.items() if key != "formats"} | {"schema_version": 1}
    new = ("values", "provenance", "module")
    old["records"] = [{key: value for key, value in record.items() if key not in new}
                      for record in data["records"]]
    read = Report.from_dict(old)
    assert read.records[0].values is None and read.records[0].module == ""
    assert read.records[0].sqnr_db == 20.0


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: d["records"][0].update(nbytes="many"), r"records\[0\]\.nbytes is 'many'"),
    (lambda d: d["records"][0]["values"]["exponents"]["counts"].append(-1), r"counts\[4\] is -1"),
    (lambda d: d["records"][0]["values"].pop("rms"), r"values is without 'rms'"),
    (lambda d: d["records"][1].update(surprise=1), r"records\[1\] is with 'surprise'"),
    (lambda d: d["records"][1].update(role="king"), r"records\[1\]\.role is 'king'"),
    (lambda d: d["fidelity"].update(cosine=True), r"fidelity\.cosine is True"),
])
def test_damaged_files_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    data = example().to_dict()
    change(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=rf"bad\.json.*{message}"):
        Report.load(tmp_path / "bad.json")


def test_diff_names_what_changed_and_sorts_by_loss() -> None:
    old = example()
    one, two = old.records
    new = dataclasses.replace(old, nbytes_after=30, records=(
        dataclasses.replace(one, sqnr_db=18.0, decided_by="q"),
        dataclasses.replace(two, sqnr_db=11.5, format="int4"),
        dataclasses.replace(two, node="mm_2")))
    found = old.diff(new)
    assert [(one.node, one.change, one.loss_db) for one in found.tensors] == [
        ("mm_1", "changed", 8.5), ("mm", "changed", 2.0), ("mm_2", "added", None)]
    assert found.tensors[0].fields == ("format", "sqnr_db")
    assert found.summary == (("nbytes_after", 20, 30),)
    assert [one.change for one in new.diff(old).tensors] == ["changed", "changed", "removed"]
    assert not old.diff(example())
    near = dataclasses.replace(old, records=(dataclasses.replace(one, sqnr_db=19.0), two))
    assert old.diff(near, 0.9) and not old.diff(near, 1.0)
    lost = dataclasses.replace(old, records=(dataclasses.replace(one, sqnr_db=math.nan), two))
    assert math.isnan(old.diff(lost).tensors[0].loss_db or 0) and not lost.diff(lost)
    json.dumps(old.diff(lost).to_dict(), allow_nan=False)
    with pytest.raises(ConfigError, match="threshold"):
        old.diff(new, -1.0)


def test_the_command_line_compares_shows_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (str(tmp_path / name) for name in ("a.json", "b.json"))
    example().save(old)
    dataclasses.replace(example(), records=example().records[:1]).save(new)
    assert run(["report", "diff", old, old]) == 0
    assert "no difference" in capsys.readouterr().out
    assert run(["report", "diff", old, new]) == 1
    assert "mm_1" in capsys.readouterr().out
    assert run(["report", "diff", old, new, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["tensors"][0]["change"] == "removed"
    assert run(["report", "diff", old, str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert run(["report", "show", old]) == 0
    assert "mxfp4" in capsys.readouterr().out
    assert run(["report", "html", old, "-o", str(tmp_path / "a.html")]) == 0
    assert "mm_1" in (tmp_path / "a.html").read_text()
    assert run(["report", "html", old, "-o", str(tmp_path / "a.pdf")]) == 2
    capsys.readouterr()
    assert run(["report", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schemas.report_schema()


def test_several_recipes_stand_side_by_side(ids: torch.Tensor, model: Small) -> None:
    report, compiled = compare_recipes(model, (ids,), ["int8-dynamic", "mxfp4"], "reference",
                                       seconds=0.01)
    assert [one.recipe for one in report.variants] == ["int8-dynamic", "mxfp4"]
    assert [one.nbytes for one in report.variants] == [one.nbytes for one in compiled]
    good, poor = report.variants
    assert good.fidelity["cosine"] > poor.fidelity["cosine"] > 0.9
    assert good.speed is not None and good.speed > 0 and report.recipe == "int8-dynamic"
    assert Report.from_dict(report.to_dict()).variants == report.variants
    with pytest.raises(ConfigError, match="two recipes"):
        compare_recipes(model, (ids,), ["mxfp4", "mxfp4"], "reference")
