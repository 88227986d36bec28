"""One call compiles a model; the result runs, reports, verifies, exports, saves and loads."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import onnx
import pytest
import torch

import scaleprop
from scaleprop.errors import (
    BackendUnavailable,
    CalibrationError,
    CaptureError,
    ConfigError,
    ScalePropError,
)
from scaleprop.recipes import named_recipes
from scaleprop.recipes.training_named import training_recipe


@dataclasses.dataclass
class Output:
    hidden: torch.Tensor
    scores: tuple[torch.Tensor, ...]
    nothing: None = None


torch.export.register_dataclass(Output, serialized_type_name="tests.face.Output")


class Encoder(torch.nn.Module):
    """Embedding, tied head, norm, two linears; dict in, dataclass out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 64)
        self.up = torch.nn.Linear(64, 160)
        self.down = torch.nn.Linear(160, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.head = torch.nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Output:
        x = self.embed(ids)
        x = self.norm(x + self.down(torch.nn.functional.gelu(self.up(x))))
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return Output(x, (self.head(x),))


def inputs(batch: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(batch * 100 + length)
    return {"ids": torch.randint(0, 50, (batch, length)), "mask": torch.ones(batch, length)}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return Encoder()


RECIPES = [recipe.name for recipe in named_recipes()]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_and_verifies_on_onnxruntime(
    model: torch.nn.Module, recipe: str, tmp_path: Path
):
    compiled = scaleprop.compile(model, inputs(), recipe=recipe, calibration=[inputs(3, 7)])
    fidelity = compiled.verify()
    assert fidelity.cosine > (0.97 if "4" in recipe else 0.995)
    for batch, length in ((2, 5), (1, 1), (3, 9)):
        given = inputs(batch, length)
        got, want = compiled(**given), model(**given)
        assert isinstance(got, Output) and got.nothing is None
        assert got.scores[0].shape == want.scores[0].shape
        cosine = torch.cosine_similarity(got.hidden.flatten(), want.hidden.flatten(), dim=0)
        assert cosine > (0.95 if "4" in recipe else 0.99)
    assert compiled.nbytes < compiled.nbytes_before
    assert compiled.report.quantized
    assert all(record.reason for record in compiled.report.high)
    compiled.export(tmp_path / "m.onnx")
    exported = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(exported, full_check=False)
    assert {value.name for value in exported.graph.input} == {"ids", "mask"}
    metadata = {entry.key: entry.value for entry in exported.metadata_props}
    assert metadata["scaleprop.recipe"] == recipe
    scaled = [record for record in json.loads(metadata["scaleprop.records"]) if "format" in record]
    assert {record["format"] for record in scaled} == {r.format for r in compiled.report.quantized}
    assert {record["scale_kind"] for record in scaled} <= {"weight", "static", "dynamic"}
    assert all(record["decided_by"] for record in scaled)


def test_the_model_is_left_as_it_was(model: torch.nn.Module):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scaleprop.compile(model, inputs(), recipe="int4", backend="reference")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_saved_models_load_without_pickle_and_compute_the_same(
    model: torch.nn.Module, backend: str, tmp_path: Path
):
    compiled = scaleprop.compile(model, inputs(), recipe="mxfp4", backend=backend)
    compiled.save(tmp_path / "saved")
    assert sorted(path.suffix for path in (tmp_path / "saved").iterdir()) == [
        ".json", ".json", ".json", ".safetensors", ".safetensors"]
    loaded = scaleprop.load(tmp_path / "saved")
    assert loaded.recipe == compiled.recipe and loaded.backend == backend
    assert loaded.report.to_dict() == compiled.report.to_dict()
    for given in (inputs(), inputs(4, 3)):
        got, want = loaded(**given), compiled(**given)
        assert torch.equal(got.hidden, want.hidden) and torch.equal(got.scores[0], want.scores[0])
    loaded.save(tmp_path / "saved")  # over an older one


def test_damaged_and_foreign_folders_are_refused(model: torch.nn.Module, tmp_path: Path):
    with pytest.raises(ConfigError, match="not a saved model"):
        scaleprop.load(tmp_path / "missing")
    folder = scaleprop.compile(model, inputs(), backend="reference").save(tmp_path / "saved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    compiled = scaleprop.load(folder)
    with pytest.raises(ConfigError, match="not a saved model"):
        compiled.save(tmp_path / "mine")
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    for version in (1, 99):
        (folder / "config.json").write_text(json.dumps({**config, "format_version": version}))
        with pytest.raises(ConfigError, match=rf"another version .*{version}, .*compile and save"):
            scaleprop.load(folder)
    (folder / "config.json").write_text(text)
    tensors = (folder / "tensors-00001.safetensors").read_bytes()
    (folder / "tensors-00001.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(ConfigError, match=r"tensors-00001\.safetensors"):
        scaleprop.load(folder)


def test_an_interrupted_save_leaves_the_old_one(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = scaleprop.compile(model, inputs(), backend="reference")
    compiled.save(tmp_path / "saved")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scaleprop.storage.tensorfile.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compiled.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    scaleprop.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"recipe": "mxpf4"}, ConfigError, "mxfp4"),
        ({"backend": "onnxruntme"}, ConfigError, "onnxruntime"),
        ({"recipe": "int8"}, CalibrationError, "calibration"),
        ({"recipe": "int8", "calibration": []}, CalibrationError, "empty"),
        ({"exclude": ["no.such.module"]}, ConfigError, "no.such.module"),
        ({"example_inputs": 3}, ConfigError, "example inputs"),
        ({"example_inputs": (torch.ones(2, 5),)}, CaptureError, "Encoder"),
        ({"passes": ["smoth"]}, ConfigError, "smoth"),
    ],
)
def test_what_makes_no_sense_is_named(model: torch.nn.Module, changes, error, message):
    arguments = {"example_inputs": inputs(), "recipe": "int8-dynamic", **changes}
    with pytest.raises(error, match=message):
        scaleprop.compile(model, **arguments)


def test_nan_in_calibration_names_node_and_batch():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    bad = torch.full((2, 8), float("nan"))
    with pytest.raises(CalibrationError, match=r"batch 1"):
        scaleprop.compile(model, torch.ones(2, 8), recipe="int8",
                          calibration=[torch.ones(2, 8), bad])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_missing_device_is_named(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("scaleprop.backends.cuda.backend.interpreted", lambda: False)
    with pytest.raises(BackendUnavailable, match="CUDA"):
        scaleprop.compile(model, inputs(), backend="cuda")


def test_an_export_without_its_packages_names_the_extra(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = scaleprop.compile(model, inputs(), backend="reference")
    for name in [name for name in sys.modules if name.startswith("scaleprop.backends.onnxr")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[onnx\]"'):
        compiled.export(tmp_path / "m.onnx")


def test_unwritable_paths_are_named(model: torch.nn.Module, tmp_path: Path):
    compiled = scaleprop.compile(model, inputs())
    for path in (tmp_path / "no" / "folder" / "m.onnx", tmp_path / "m.txt", tmp_path):
        with pytest.raises(ConfigError, match="cannot"):
            compiled.export(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ScalePropError, match="file"):
        compiled.save(tmp_path / "file" / "saved")


def test_analysis_names_outliers_and_changes_nothing(model: torch.nn.Module):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.up.weight[3, 7] = 40.0
        changed = model.up.weight.clone()
    report = scaleprop.analyze(model, inputs(), calibration=[inputs(), inputs(3, 4)])
    assert torch.equal(model.up.weight, changed)
    model.load_state_dict(before)
    weights = [r for r in report.records if r.operand == "up_weight" and r.format == "mxfp4"]
    assert len(weights) == 1 and 5 < weights[0].sqnr_db < 40
    assert any("up_weight" in note and "outlier" in note for note in report.notes)
    assert any(note.startswith("mxfp4 would leave") for note in report.notes)


class Cut(torch.nn.Module):
    """A linear, on the first rows only where there are many."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 32)

    def forward(self, x: torch.Tensor, *, factor: torch.Tensor) -> torch.Tensor:
        return self.linear(x[:4] if x.shape[0] > 6 else x) * factor


@pytest.mark.parametrize("backend", ["inductor", "onnxruntime"])
def test_an_exported_program_is_compiled_for_the_sizes_that_it_is_for(backend: str):
    model, kwargs = Cut(), {"factor": torch.ones(32)}
    rows = {"x": {0: torch.export.Dim.AUTO}, "factor": None}
    exported = torch.export.export(model, (torch.randn(5, 64),), kwargs, dynamic_shapes=rows)
    for _ in range(2):  # what a backend assumed the first time does not count the second time
        compiled = scaleprop.compile(exported, exported.example_inputs, backend=backend)
        assert compiled.program.guards == ("x.shape[0] <= 6",)
        for n in (1, 2, 6):
            x = torch.randn(n, 64)
            want = model(x, **kwargs)
            torch.testing.assert_close(compiled(x, **kwargs), want, atol=0.05, rtol=0.05)
        with pytest.raises(ConfigError, match=r"input 'x' is 7, .* x\.shape\[0\] <= 6"):
            compiled(torch.randn(7, 64), **kwargs)
    records = scaleprop.analyze(exported, exported.example_inputs).records
    assert {record.operand for record in records} == {"x", "linear_weight"}


class ArgMax(torch.nn.Module):
    """No operator that any recipe quantizes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize("model", [torch.nn.ReLU(), ArgMax()], ids=["relu", "argmax"])
@pytest.mark.parametrize("backend", ["onnxruntime", "reference"])
def test_a_model_with_nothing_to_quantize_compiles(model, backend):
    x = torch.randn(2, 7)
    compiled = scaleprop.compile(model, x, backend=backend)
    assert torch.equal(compiled(x), model(x))
    assert compiled.report.quantized == ()


def test_what_is_no_model_or_recipe_is_refused() -> None:
    linear, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    training = training_recipe("nvfp4")
    for said, call in (
        ("a model is a torch.nn.Module", lambda: scaleprop.compile(torch.relu, x)),
        ("a model is a torch.nn.Module", lambda: scaleprop.analyze("model.pt2", x)),
        ("not int", lambda: scaleprop.compile(linear, x, recipe=5)),
        ("not TrainingRecipe: scaleprop.prepare_training takes",
         lambda: scaleprop.compile(linear, x, recipe=training)),
        ("not Recipe: scaleprop.compile takes",
         lambda: scaleprop.prepare_training(linear, named_recipes()[0])),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
