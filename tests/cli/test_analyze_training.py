"""``scaleprop analyze --loss``: a training step, its source, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from scaleprop.cli import main
from scaleprop.report import ScaleReport

MODELS = '''
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)

    def forward(self, x):
        h = self.up(x)
        h = h.relu()
        return self.down(h)

class Own(Net):
    def forward(self, x):
        return {"loss": super().forward(x).square().mean(), "logits": x}

def net():
    torch.manual_seed(0)
    return Net(), torch.randn(8, 16)

def own():
    torch.manual_seed(0)
    return Own(), torch.randn(8, 16)

def frozen():
    model, x = net()
    return model.requires_grad_(False), x

def squares(output):
    return output.square().mean()

def rows(output):
    return output.square().mean(-1)

def count(output):
    return 3.5

def raises(output):
    raise RuntimeError("no such label")

number = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of models, as a user has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trained_models.py").write_text(MODELS)
    sys.modules.pop("trained_models", None)
    torch._dynamo.reset()
    return tmp_path


class Done:
    """Exit status and output of one command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.status = main(["analyze", *arguments])
        self.out, self.err = capsys.readouterr()


def squares_by_hand() -> tuple[dict[str, float], float]:
    """RMS of parameters' gradients, and of the model's output."""
    sys.modules.pop("trained_models", None)
    import trained_models  # pyright: ignore[reportMissingImports]

    model, x = trained_models.net()
    output = model(x)
    output.square().mean().backward()

    def rms(value: torch.Tensor) -> float:
        return float(value.detach().double().square().mean().sqrt())

    return {name: rms(p.grad) for name, p in model.named_parameters()}, rms(output)


def test_json_holds_the_step(capsys: pytest.CaptureFixture[str]):
    done = Done(capsys, "trained_models:net", "--loss", "trained_models:squares", "--json")
    assert done.status == 0, done.err
    report = ScaleReport.from_dict(json.loads(done.out)["report"])
    gradients, output = squares_by_hand()
    seen = {tensor.name: tensor.rms for tensor in report.of_phase("backward") if tensor.name}
    assert seen == pytest.approx(gradients, rel=1e-4)
    assert any(tensor.rms == pytest.approx(output, rel=1e-4)
               for tensor in report.of_phase("forward"))


def test_a_table_is_shown(capsys: pytest.CaptureFixture[str]):
    done = Done(capsys, "trained_models:net", "--loss", "trained_models:squares")
    assert done.status == 0, done.err
    assert "Net" in done.out and "forward" in done.out and "backward" in done.out
    assert "of products' operands have RMS in [1/8, 8]" in done.out


def test_a_model_may_return_its_loss(capsys: pytest.CaptureFixture[str]):
    done = Done(capsys, "trained_models:own", "--loss", "output", "--json")
    assert done.status == 0, done.err
    report = ScaleReport.from_dict(json.loads(done.out)["report"])
    seen = {tensor.name: tensor.rms for tensor in report.of_phase("backward") if tensor.name}
    assert seen == pytest.approx(squares_by_hand()[0], rel=1e-4)


def test_source_shows_sizes_line_by_line(capsys: pytest.CaptureFixture[str], folder: Path):
    done = Done(capsys, "trained_models:net", "--loss", "trained_models:squares", "--source")
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[0] == f"# {folder / 'trained_models.py'}"
    (last,) = [line for line in lines if "return self.down(h)" in line]
    found = re.search(r"\(→ ([\d.e-]+), ← ([\d.e-]+)\)$", last)
    assert found is not None, last
    output = squares_by_hand()[1]
    assert float(found[1]) == pytest.approx(output, rel=1e-2)
    assert float(found[2]) == pytest.approx(2 * output / 32, rel=1e-2)  # of the mean of 8·4 squares
    assert sum("(→" in line for line in lines) >= 3


def test_source_and_a_saved_report(capsys: pytest.CaptureFixture[str], folder: Path):
    path = folder / "scales.json"
    done = Done(capsys, "trained_models:net", "--loss", "trained_models:squares", "--source",
                "--report", str(path))
    assert done.status == 0, done.err
    assert ScaleReport.load(path).annotated_source() == done.out


@pytest.mark.parametrize("suffix", ["html", "json"])
def test_reports_are_saved(capsys: pytest.CaptureFixture[str], folder: Path, suffix: str):
    path = folder / f"scales.{suffix}"
    done = Done(capsys, "trained_models:net", "--loss", "trained_models:squares", "--report",
                str(path), "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["files"] == [str(path)]
    assert "down" in path.read_text() and path.stat().st_size > 1000


SQUARES = ("--loss", "trained_models:squares")


@pytest.mark.parametrize(("arguments", "reason"), [
    (("trained_models:net", "--source"), "--source shows a training step: add --loss"),
    (("trained_models:net", "--loss", "trained_models"), "expected package.module:function"),
    (("trained_models:net", "--loss", "trained_models:absent"), "has no 'absent'"),
    (("trained_models:net", "--loss", "no_such_module:f"), "cannot import 'no_such_module'"),
    (("trained_models:net", "--loss", "trained_models:number"), "is int, not a function"),
    (("trained_models:net", "--loss", "trained_models:rows"), "the loss is a tensor (8,)"),
    (("trained_models:net", "--loss", "trained_models:count"), "the loss"),
    (("trained_models:net", "--loss", "trained_models:raises"),
     "Net and its loss are not one graph"),
    (("trained_models:net", "--loss", "output"), "the loss is a tensor (8, 4)"),
    (("trained_models:frozen", *SQUARES), "the loss has no gradient"),
    (("trained_models:net", *SQUARES, "--calibration", "trained_models:net"),
     "--calibration has no use with --loss"),
    (("trained_models:net", *SQUARES, "--report", "scales.txt"), "saved as .html or .json"),
    (("trained_models:net", *SQUARES, "--inputs", "trained_models:absent"), "has no 'absent'"),
])
def test_refusals_name_the_reason(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], reason: str
):
    done = Done(capsys, *arguments)
    assert done.status == 2 and not done.out
    assert done.err.startswith("error: ") and reason in done.err
    assert "Traceback" not in done.err


def test_an_exported_program_has_no_gradients(capsys: pytest.CaptureFixture[str], folder: Path):
    path = folder / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(16, 4), (torch.randn(2, 16),)), path)
    done = Done(capsys, str(path), *SQUARES)
    assert done.status == 2 and "has no gradients" in done.err
