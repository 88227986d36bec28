"""``analyze`` with a loss: figures against plain autograd, and what stays as it was."""

from __future__ import annotations

import inspect
import io
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import CaptureError, ConfigError
from scaleprop.report import ScaleReport
from scaleprop.report.listing import annotated, size
from scaleprop.report.scales import FORMATS, Listing, Visit


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        h = self.norm(x)
        h = F.gelu(self.up(h))
        return x + self.down(h)


class Model(nn.Module):
    def __init__(self, width: int = 64, classes: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids):
        self.calls += 1
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % 24)


def rms(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@pytest.fixture(scope="module")
def step() -> tuple[Model, torch.Tensor, ScaleReport]:
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(50, (8, 32))
    return model, ids, scaleprop.analyze(model, ids, loss_fn=loss_fn)


@pytest.fixture(scope="module")
def by_hand(step) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Values and parameters of the same step by plain autograd, gradients kept."""
    model, ids, _ = step
    values: dict[str, torch.Tensor] = {"x": model.table(ids)}
    for place, block in enumerate(model.blocks):
        values[f"norm{place}"] = block.norm(values["x" if not place else f"sum{place - 1}"])
        values[f"gelu{place}"] = F.gelu(block.up(values[f"norm{place}"]))
        before = values["x" if not place else f"sum{place - 1}"]
        values[f"sum{place}"] = before + block.down(values[f"gelu{place}"])
    values["logits"] = model.head(values["sum1"])
    for value in values.values():
        value.retain_grad()
    loss_fn(values["logits"]).backward()
    parameters = dict(model.named_parameters())
    gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    model.zero_grad()
    return values, gradients


def line_of(function, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    (place,) = [place for place, line in enumerate(lines) if text in line]
    return first + place


@pytest.mark.parametrize(("function", "text", "module", "value"), [
    (Model.forward, "self.table(ids)", "", "x"),
    (Block.forward, "self.norm(x)", "blocks.0", "norm0"),
    (Block.forward, "self.norm(x)", "blocks.1", "norm1"),
    (Block.forward, "F.gelu", "blocks.0", "gelu0"),
    (Block.forward, "return x +", "blocks.0", "sum0"),
    (Block.forward, "return x +", "blocks.1", "sum1"),
    (Model.forward, "self.head(x)", "", "logits"),
])  # fmt: skip
def test_lines_have_the_sizes_of_their_values_and_gradients(
    step, by_hand, function, text, module, value
):
    want = by_hand[0][value]
    line = line_of(function, text)
    (visit,) = [v for v in step[2].visits if (v.line, v.module) == (line, module)
                and v.file == __file__]
    assert visit.forward == pytest.approx(rms(want), rel=1e-5)
    assert visit.backward == pytest.approx(rms(want.grad), rel=1e-5)


def test_gradients_of_parameters_are_autograds(step, by_hand):
    rows = {t.name: t for t in step[2].of_phase("backward") if t.name}
    assert rows.keys() == by_hand[1].keys()
    for name, want in by_hand[1].items():
        assert rows[name].rms == pytest.approx(rms(want), rel=1e-4), name
        assert rows[name].mean == pytest.approx(float(want.double().mean()), abs=1e-3 * rms(want))


def test_parameters_have_the_figures_of_their_numbers(step):
    model, _, report = step
    rows = {t.name: t for t in report.of_phase("parameter")}
    for name, value in model.named_parameters():
        row, x = rows[name], value.detach().double().flatten()
        assert row.shape == tuple(value.shape) and row.count == value.numel()
        assert row.amax == float(x.abs().max()) and row.rms == pytest.approx(rms(x), rel=1e-12)
        if float(x.var()):
            want = float((x - x.mean()).pow(4).mean() / x.var(correction=0).square())
            assert row.kurtosis == pytest.approx(want, rel=1e-9)
        else:
            assert row.kurtosis is None
        want = torch.floor(torch.log2(x[x != 0].abs())).long()
        assert row.exponents == {int(e): int(n) for e, n in zip(
            *want.unique(return_counts=True), strict=True)}
        assert row.zeros == float((x == 0).double().mean())


SMALLEST = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "e2m1": 0.5, "f16": 2.0**-24, "bf16": 2.0**-133}
LARGEST = {"e4m3": 448, "e5m2": 57344, "e2m1": 6, "f16": 65504, "bf16": 3.38e38}


class Spread(nn.Module):
    """Values between 2^-40 and 2^12."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.exp2(torch.linspace(-40, 12, 1000)))

    def forward(self, x):
        return self.weight * x


def test_what_a_format_loses_is_counted():
    report = scaleprop.analyze(Spread(), torch.ones(1000), loss_fn=torch.sum)
    (made,) = [t for t in report.of_phase("forward") if t.op == "aten.mul.Tensor"]
    x = torch.exp2(torch.linspace(-40, 12, 1000))
    for name in FORMATS:
        assert made.underflow[name] == pytest.approx(float((x < SMALLEST[name]).double().mean()))
        assert made.overflow[name] == pytest.approx(float((x > LARGEST[name]).double().mean()))
    lost = {flag.rpartition("↓")[0].strip() for flag in made.flags if "↓" in flag}
    assert lost == {"e4m3", "e5m2", "e2m1", "f16"}
    assert any(flag.startswith("e4m3 ↑") for flag in made.flags)
    assert report.lost()["e4m3"][1] >= 1 and report.lost()["bf16"] == (0, 0)


def test_predictions_are_close_in_both_passes(step):
    report = step[2]
    assert not report.unknown
    for phase in ("forward", "backward"):
        rows = [t for t in report.of_phase(phase) if t.predicted is not None]
        assert len(rows) > 10
        off = sorted(abs(math.log2(t.ratio)) for t in rows if t.ratio)
        assert off[len(off) // 2] < 0.15
        assert report.predicted_within(phase) >= 0.85
    assert all(t.predicted is None for t in report.of_phase("parameter"))


def test_operands_are_those_of_products(step):
    report = step[2]
    forward = {t.name for t in report.tensors if t.name and "forward" in t.read_in}
    assert forward == {name for name, _ in step[0].named_parameters()
                       if name.endswith("weight") and not {"norm", "table"} & set(name.split("."))}
    assert 0 < report.near_one("forward") < 1
    assert report.near_one("forward", 1e9) == 1


def test_nothing_is_changed(step):
    model, *_ = step
    assert float(model.calls) == 0  # the model counts its calls
    assert all(p.grad is None for p in model.parameters())
    state = torch.get_rng_state()
    dropping = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    torch.set_rng_state(state)
    scaleprop.analyze(dropping, torch.ones(4, 64), loss_fn=lambda y: y.square().mean())
    assert torch.equal(torch.get_rng_state(), state)
    assert int(dropping[2].num_batches_tracked) == 0


def test_a_model_that_returns_its_loss():
    class Losing(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.inner, self.kind = nn.Linear(4, 4), kind

        def forward(self, x):
            loss = self.inner(x).square().mean()
            return {"loss": loss, "x": x} if self.kind == "dict" else (loss, x) \
                if self.kind == "tuple" else loss

    sizes = set()
    for kind in ("dict", "tuple", "alone"):
        torch.manual_seed(0)
        report = scaleprop.analyze(Losing(kind), torch.ones(2, 4), loss_fn="output")
        sizes |= {t.rms for t in report.of_phase("backward") if t.name == "inner.weight"}
    assert len(sizes) == 1


def test_refusals_are_named():
    model, x = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(ConfigError, match=r"the loss is a tensor \(2, 4\) .*not one float number"):
        scaleprop.analyze(model, x, loss_fn=lambda y: y)
    with pytest.raises(ConfigError, match="the loss is a tensor"):
        scaleprop.analyze(model, x, loss_fn="output")
    with pytest.raises(ConfigError, match="loss_fn='mse'"):
        scaleprop.analyze(model, x, loss_fn="mse")
    with pytest.raises(ConfigError, match="calibration has no use with loss_fn"):
        scaleprop.analyze(model, x, [x, x], loss_fn=torch.sum)
    with pytest.raises(ConfigError, match="not ExportedProgram"):
        scaleprop.analyze(torch.export.export(model, (x,)), x, loss_fn=torch.sum)
    with pytest.raises(ConfigError, match="no parameter that it depends on requires one"):
        scaleprop.analyze(nn.Linear(4, 4).requires_grad_(False), x, loss_fn=torch.sum)

    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if float(x.sum()) > 0 else x

    with pytest.raises(CaptureError, match=r"(?s)Sequential and its loss are not one.*Remedy"):
        scaleprop.analyze(nn.Sequential(model, Branching()), x, loss_fn=torch.sum)


def test_inputs_without_data_and_those_that_share_memory_are_refused():
    with pytest.raises(CaptureError, match=r"no data: .*'meta'.*Remedy: load the weights"):
        scaleprop.analyze(nn.Linear(4, 4, device="meta"), torch.ones(2, 4, device="meta"),
                          loss_fn=torch.sum)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x.mul_(2)) + y

    x = torch.ones(2, 4)
    with pytest.raises(CaptureError, match=r"share memory. Remedy: pass copies"):
        scaleprop.analyze(Shared(), (x, x.view(2, 4)), loss_fn=torch.sum)


def test_json_html_and_table(step, tmp_path):
    from rich.console import Console

    report = step[2]
    report.save(tmp_path / "r.json")
    assert ScaleReport.load(tmp_path / "r.json") == report
    json.dumps(report.to_dict(), allow_nan=False)
    report.save(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert page.count('<tr id="t=') == len(report.tensors)
    assert "→ " in page and "norm-placement" in page and "http://" not in page
    console = Console(width=250, record=True, file=io.StringIO())
    report.show(console)
    shown = console.export_text()
    assert "blocks.1.down.weight" in shown and "residual-growth" in shown
    with pytest.raises(ConfigError, match=r"saved as \.html or \.json"):
        report.save("r.txt")
    for broken in ({"schema": "x"}, {**report.to_dict(), "tensors": [{}]},
                   {**report.to_dict(), "more": 1}):
        with pytest.raises(ConfigError):
            ScaleReport.from_dict(broken)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        ScaleReport.load(tmp_path / "list.json")


def test_the_source_is_annotated(step):
    listed = step[2].annotated_source()
    assert f"# {__file__}" in listed
    (line,) = [line for line in listed.splitlines() if "h = self.norm(x)" in line]
    assert line.rstrip().endswith(")") and "(→ 1.0, ← " in line
    (line,) = [line for line in listed.splitlines() if "return x + self.down(h)" in line]
    (line,) = [line for line in listed.splitlines() if "F.gelu(self.up(h))" in line]
    assert "(→ 0." in line
    assert "def forward(self, ids):" in listed


def test_annotations_of_lines():
    visits = [Visit("m.py", 2, "a", 1.0, 0.236), Visit("m.py", 2, "b", 4.0, 0.236),
              Visit("m.py", 3, "", 2.4e-5, None)]
    text = annotated(visits, [Listing("m.py", 1, ("def f(x):", "    y = g(x)", "    return y"))])
    lines = text.splitlines()
    assert lines[0] == "# m.py" and lines[1].split() == ["1", "def", "f(x):"]
    assert lines[2].endswith("(→ 1.0 … 4.0, ← 0.236)") and lines[3].endswith("(→ 2.4e-05)")
    assert annotated([], []) == ""
    assert [size(x) for x in (1.0, 0.236, 12.0, 2.4e-5, math.inf)] == [
        "1.0", "0.236", "12.0", "2.4e-05", "inf"]


def test_operands_of_convolutions_and_attention_are_read_in_both_passes():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.table = nn.Conv1d(8, 8, 3, padding=1), nn.Embedding(5, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, ids):
            x = self.conv(self.table(ids).mT).mT[:, None].contiguous()
            return self.out(F.scaled_dot_product_attention(x, x.sin(), x.cos()))

    report = scaleprop.analyze(Net(), torch.randint(5, (2, 6)), loss_fn=torch.mean)
    read = {t.name or t.op.split(".")[1]: t.read_in for t in report.tensors if t.read_in}
    both = ("backward", "forward")
    assert read["conv.weight"] == read["sin"] == read["cos"] == read["convolution"] == both
    assert read["embedding"] == both  # the convolution's input; its gradient too needs it
    assert "table.weight" not in read and not any("bias" in name for name in read)


def test_constants_of_a_model_are_there():
    class Constant(nn.Linear):
        def forward(self, x):
            low = torch.where(x > 0, torch.tensor(2.0, dtype=x.dtype), torch.tensor(3.0))
            return super().forward(low)

    report = scaleprop.analyze(Constant(4, 4), torch.tensor([[1.0, -1, 1, -1]]), loss_fn=torch.sum)
    (made,) = [t for t in report.of_phase("forward") if t.op == "aten.where.self"]
    assert (made.amax, made.mean) == (3.0, 2.5)
