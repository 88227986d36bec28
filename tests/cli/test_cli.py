"""The command line: pure JSON; a clear reason and exit status 2 for what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from scaleprop.analysis.timing import interleaved_medians
from scaleprop.cli import main
from scaleprop.cli.doctor import CPU_FEATURES, cpu
from scaleprop.formats import named_formats, parse
from scaleprop.recipes import Recipe, named_recipes
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.recipes.training_named import NAMED
from scaleprop.report import Report

MODELS = """
import torch

def small():
    print("a model that prints")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32))
    return model, torch.randn(4, 64)

class Gap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        return torch.erfinv(self.linear(self.linear(x))), x.shape[0] * 2

def gap():
    return Gap(), torch.randn(4, 64)

def bare():
    return torch.nn.Linear(64, 32)

def inputs():
    return torch.randn(4, 64)

def batches():
    return [torch.randn(4, 64) for _ in range(3)]

def run_batches(model):
    for batch in batches():
        model(batch)

def nothing():
    return 3

def broken():
    raise RuntimeError("no weights here")

def interrupt():
    raise KeyboardInterrupt

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of models, as a user has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "cli_models.py").write_text(MODELS)
    sys.modules.pop("cli_models", None)
    return tmp_path


class Done:
    """Exit status and output of one command."""

    def __init__(self, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.status = main(arguments)
        self.out, self.err = capsys.readouterr()

    @property
    def json(self) -> dict[str, object]:
        assert self.status == 0, self.err
        return json.loads(self.out)


# ------------------------------------------------------------------ listings


def test_formats_lists_every_named_format(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Done(["formats", "--json"], capsys).json["formats"]
    assert [row["name"] for row in rows] == list(named_formats())
    by_name = {row["name"]: row for row in rows}
    assert by_name["mxfp4"]["max"] == 6
    assert by_name["mxfp4"]["bytes_per_value"] == round((4 + 8 / 32) / 8, 5)
    assert by_name["nvfp4"]["bytes_per_value"] == (4 + 8 / 16) / 8
    for row in rows:
        assert parse(row["in_full"]) == parse(row["name"])
    shown = Done(["formats"], capsys)
    assert shown.status == 0
    assert all(name in shown.out for name in named_formats())


def test_formats_describes_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = Done(["formats", "int4[1x64]*f16+zp", "--json"], capsys).json["formats"]
    assert (row["bits"], row["max"], row["bytes_per_value"]) == (4, 15, (4 + 16 / 64) / 8)


def test_recipes_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Done(["recipes", "--json"], capsys).json["recipes"]
    assert [Recipe.from_dict(row) for row in rows] == list(named_recipes())
    shown = Done(["recipes", "int8"], capsys)
    assert "static" in shown.out
    assert "mxfp4" not in shown.out


def test_training_recipes_round_trip(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Done(["recipes", "--training", "--json"], capsys).json["recipes"]
    assert [TrainingRecipe.from_dict(row) for row in rows] == list(NAMED)
    shown = Done(["recipes", "nvfp4", "--training"], capsys)
    assert "nvfp4_2d" in shown.out and "mxfp8" not in shown.out
    wrong = Done(["recipes", "nvfp5", "--training"], capsys)
    assert wrong.status == 2 and "did you mean 'nvfp4'" in wrong.err


def test_passes_lists_options(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Done(["passes", "--json"], capsys).json["passes"]
    names = [row["name"] for row in rows]
    assert names[0] == "clean-up"
    assert all(row["summary"] for row in rows)
    shown = Done(["passes"], capsys)
    assert all(name in shown.out for name in names)


def test_rules_shows_the_registry_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["op"]: row for row in Done(["rules", "--json"], capsys).json["rules"]}
    assert rows["aten.linear.default"] == {
        "op": "aten.linear.default", "family": "contraction", "axes": True, "moves": False,
        "homogeneity": "x0^1*x1^1, follows x2", "contraction": "linear", "high": "", "count": 0,
        "bounded": False, "degree": None, "moments": True}
    assert rows["aten.layer_norm.default"]["high"] == "norms run in high precision"
    shown = Done(["rules"], capsys)
    assert all(op in shown.out for op in rows)
    without = Done(["rules", "--missing", "--json"], capsys).json["rules"]
    assert without == [row for row in rows.values() if row["family"] is None]
    missing = Done(["rules", "--missing"], capsys)
    assert f"{len(without)} of {len(rows)} operators have no rule" in missing.out
    assert "calls" not in missing.out and "aten.linear" not in missing.out


def test_rules_counts_what_a_model_calls(capsys: pytest.CaptureFixture[str]) -> None:
    rows = Done(["rules", "cli_models:gap", "--json"], capsys).json["rules"]
    assert {row["op"]: row["count"] for row in rows} == {  # and no function of Python's
        "aten.linear.default": 2, "aten.erfinv.default": 1, "aten.sym_size.int": 1}
    families = {row["op"]: row["family"] for row in rows}
    assert families["aten.linear.default"] == "contraction"
    assert families["aten.erfinv.default"] is None
    shown = Done(["rules", "cli_models:gap"], capsys)
    assert "calls" in shown.out and "of 3 operators have no rule" in shown.out
    shown = Done(["rules", "cli_models:small", "--missing"], capsys)
    assert shown.out == "a model that prints\n" + (
        "0 of 2 operators have no rule: they are left in float\n")


def test_docs_rules_is_what_the_registry_says(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "wrote rules.md" in Done(["rules", "--markdown", "rules.md"], capsys).out
    committed = Path(__file__).parents[2] / "docs" / "rules.md"
    assert committed.read_text("utf-8") == (folder / "rules.md").read_text("utf-8"), (
        "write it again: scaleprop rules --markdown docs/rules.md")


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_compile_reports_as_pure_json(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = Done(["compile", "cli_models:small", "--recipe", "mxfp4", "--backend", backend,
                 "--verify", "--json"], capsys)
    report = Report.from_dict(done.json["report"])
    assert (report.recipe, report.backend) == ("mxfp4", backend)
    assert {record.format for record in report.quantized} == {"mxfp4:even"}
    assert "a model that prints" in done.err


def test_compile_saves_what_load_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import scaleprop

    files = Done(["compile", "cli_models:small", "--backend", "reference", "--out", "saved",
                  "--report", "r.html", "--json"], capsys).json["files"]
    assert files == ["saved", "r.html"]
    assert (folder / "r.html").stat().st_size > 1000
    assert scaleprop.load("saved")(torch.randn(3, 64)).shape == (3, 32)


def test_auto_needs_a_target_and_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["compile", "cli_models:small", "--backend", "reference", "--recipe", "auto"]
    assert "target='int4'" in Done(base, capsys).err
    assert "auto measures errors" in Done([*base, "--target", "int4"], capsys).err


def test_compile_shows_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    done = Done(["compile", "cli_models:small", "--backend", "reference", "--exclude", "2.*"],
                capsys)
    assert done.status == 0, done.err
    assert "stayed high" in done.out
    assert "2.*" in done.out


@pytest.mark.parametrize("calibration", ["batches", "run_batches"])
def test_export_writes_onnx_from_calibration(
    calibration: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Done(["export", "cli_models:bare", "--inputs", "cli_models:inputs", "--recipe", "int8",
                 "--calibration", f"cli_models:{calibration}", "--out", "m.onnx", "--json"], capsys)
    assert done.json["files"] == ["m.onnx"]
    assert (folder / "m.onnx").stat().st_size > 1000
    kinds = {r["scale_kind"] for r in done.json["report"]["records"] if r["format"]}
    assert kinds == {"weight", "static"}


def test_an_exported_program_is_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import scaleprop

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor, *, factor: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * factor

    example = (torch.randn(2, 3, 5, 64),), {"factor": torch.ones(32)}
    third = {"x": {2: torch.export.Dim("third", max=40)}, "factor": None}  # and no other size
    torch.export.save(torch.export.export(Scaled(), *example, dynamic_shapes=third), "m.pt2")
    done = Done(["compile", "m.pt2", "--backend", "reference", "--out", "saved", "--json"], capsys)
    assert [r["op"] for r in done.json["report"]["records"] if r["format"]]
    loaded = scaleprop.load("saved")
    assert loaded(torch.randn(2, 3, 9, 64), factor=torch.ones(32)).shape == (2, 3, 9, 32)
    with pytest.raises(ValueError, match="expected shape"):
        loaded(torch.randn(4, 3, 9, 64), factor=torch.ones(32))
    with pytest.raises(ValueError, match=r"x\.shape\[2\] <= 40"):
        loaded(torch.randn(2, 3, 41, 64), factor=torch.ones(32))
    rows = Done(["bench", "m.pt2", "--backend", "reference", "--seconds", "0.01", "--json"],
                capsys).json["rows"]
    assert [row["name"] for row in rows] == [
        "eager float32", "reference float32", "reference int8-dynamic"]


def test_analyze_changes_nothing_and_compares_formats(capsys: pytest.CaptureFixture[str]) -> None:
    report = Done(["analyze", "cli_models:small", "--json"], capsys).json["report"]
    assert report["recipe"] is None
    assert len({record["format"] for record in report["records"]}) > 3


def test_analyze_tells_outliers_and_what_passes_change(capsys: pytest.CaptureFixture[str]) -> None:
    done = Done(["analyze", "cli_models:small", "-p", "clean-up", "--json"], capsys)
    profiles = done.json["report"]["outliers"]["profiles"]
    assert profiles and all(p["after"] == pytest.approx(p["difficulty"]) for p in profiles)
    assert "relative after" in Done(["analyze", "cli_models:small"], capsys).out


def test_bench_compares_with_float32(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "cli_models:small", "--recipe", "int8-dynamic", "--recipe", "mxfp4",
                 "--seconds", "0.05"]
    rows = Done([*arguments, "--json"], capsys).json["rows"]
    assert [row["name"] for row in rows] == [
        "eager float32", "onnxruntime float32", "onnxruntime int8-dynamic", "onnxruntime mxfp4"]
    assert rows[0]["speedup"] == rows[0]["size_ratio"] == 1
    assert rows[1]["cosine"] > 0.999999
    assert 0.9 < rows[3]["cosine"] < rows[2]["cosine"] < 1
    assert rows[3]["nbytes"] < rows[2]["nbytes"] < rows[0]["nbytes"]
    assert "cosine" in Done(arguments, capsys).out


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compile", "small"], "expected package.module:function, a .pt2 file or"),
        (["compile", "no_such_module:f"], "cannot import 'no_such_module'"),
        (["compile", "cli_models:absent"], "'cli_models' has no 'absent'"),
        (["compile", "cli_models:number"], "is int, not a function"),
        (["compile", "cli_models:nothing"], "returned int; expected a torch.nn.Module"),
        (["compile", "cli_models:broken"], "raised RuntimeError: no weights here"),
        (["compile", "cli_models:bare"], "pass --inputs"),
        (["compile", "absent.pt2"], "no such file: 'absent.pt2'"),
        (["compile", "cli_models.pt2"], "no such file"),
        (["compile", "cli_models:small", "--recipe", "mxpf4"], "did you mean 'mxfp4'"),
        (["compile", "cli_models:small", "--report", "r.pdf"], ".html or .json"),
        (["compile", "cli_models:small", "-p", "clean-upp"], "did you mean 'clean-up'"),
        (["compile", "cli_models:small", "--recipe", "int8"], "calibration"),
        (["analyze", "cli_models:small", "-p", "nothing"], "unknown pass 'nothing'"),
        (["analyze", "cli_models:small", "-p", "clean-up", "--loss", "output"], "--pass has no"),
        (["export", "cli_models:small", "--out", "m.bin"], "an export is a .onnx file"),
        (["formats", "mxfp3"], "unknown format 'mxfp3'"),
        (["rules", "cli_models:bare"], "pass --inputs"),
        (["rules", "--inputs", "cli_models:inputs"], "there is no MODEL"),
        (["rules", "--markdown", "absent/rules.md"], "create the folder 'absent'"),
        (["recipes", "nope.toml"], "cannot read recipe 'nope.toml'"),
    ],
)
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_refusals_say_why(
    arguments: list[str], message: str, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    done = Done([*arguments, *extra], capsys)
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
    assert done.out == "" or not extra


def test_a_damaged_exported_program_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "m.pt2").write_bytes(b"not a program")
    done = Done(["compile", "m.pt2"], capsys)
    assert (done.status, done.out) == (2, "")
    assert "is not an exported program" in done.err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown format"):
        main(["formats", "mxfp3", "--debug"])


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    done = Done(["compile", "cli_models:small", "--backend", "tpu"], capsys)
    assert done.status == 2
    assert "tpu" in done.err


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    done = Done(["compile", "cli_models:interrupt"], capsys)
    assert (done.status, done.out) == (130, "")
    assert done.err.strip() == "interrupted"


@pytest.mark.parametrize("package", ["click", "rich"])
def test_missing_packages_name_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = Done(["formats"], capsys)
    assert done.status == 2
    assert 'pip install "scaleprop[cli]"' in done.err


def test_help_is_light_and_lists_every_command() -> None:
    code = ("import sys; from scaleprop.cli import main; main(['--help']); "
            "sys.exit('onnxruntime' in sys.modules or 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("compile", "analyze", "export", "formats", "recipes", "rules", "passes",
                 "doctor", "bench"):
        assert f"\n  {name} " in done.stdout


def test_python_m_scaleprop_and_closed_pipes() -> None:
    done = subprocess.run(f"{sys.executable} -m scaleprop formats | head -n 1", shell=True,
                          capture_output=True, text=True)
    assert done.stderr == ""


# ------------------------------------------------------------------ parts


def test_doctor_tries_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    found = Done(["doctor", "--json"], capsys).json
    tests = {test["backend"]: test for test in found["self_test"]}
    assert set(tests) == {"reference", "inductor", "onnxruntime", "cuda"}
    assert tests["reference"]["status"] == tests["onnxruntime"]["status"] == "ok"
    assert "cosine" in tests["onnxruntime"]["detail"]
    assert {row["name"] for row in found["packages"]} >= {"onnxruntime", "matplotlib"}
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]


def test_doctor_fails_where_a_backend_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("scaleprop.api.compile", broken)
    done = Done(["doctor"], capsys)
    assert done.status == 1
    assert "RuntimeError: out of luck" in done.out


def test_cpu_features_come_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: A chip\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n\n"
                    "model name\t: A chip\nflags\t\t: fpu\n")
    assert cpu(file) == {"model": "A chip", "features": ["avx2", "avx512_vnni", "amx_int8"]}
    file.write_text("Features\t: asimddp i8mm\n")
    assert cpu(file)["features"] == ["asimddp", "i8mm"]
    assert cpu(tmp_path / "absent")["features"] is None
    assert set(cpu()["features"] or ()) <= set(CPU_FEATURES)


def test_medians_are_interleaved() -> None:
    order: list[str] = []
    found = interleaved_medians(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0, min_rounds=3)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert all(value >= 0 for value in found.values())


def test_every_command_has_help() -> None:
    from scaleprop.cli.app import app

    for name, command in app.commands.items():
        assert command.help, name
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None) or \
                parameter.name == "backend"
