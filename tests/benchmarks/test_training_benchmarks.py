"""Exact mode as benchmarks run it, and what the training benchmarks make of their figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("psutil")

from benchmarks import harness, joint_architectures, learning_rate_transfer, training_overhead
from benchmarks.exact import Exact, without_casts
from benchmarks.harness import Results
from benchmarks.models import Sample
from scaleprop.passes.training import Formats, lower_products
from tests.passes.training_graphs import joint_of


class Net(nn.Module):
    """A stream, a norm and a head; its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 32), nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(x), torch.arange(len(x)) % 7)


def step(run: Any, model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = run(*inputs)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()
                                      if p.grad is not None}}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture
def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), 1000 * torch.randn(32, 16)


# --- exact mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("inner", "dtype"), [
    ("eager", torch.float64), ("eager", torch.float32), ("inductor", torch.float64)], ids=str)
def test_exact_mode_is_eager(
    net: tuple[nn.Module, torch.Tensor], inner: Any, dtype: torch.dtype
) -> None:
    """The recipe's exponents, none of its casts: loss and gradients of plain autograd."""
    model, x = (each.to(dtype) for each in net)
    want = step(model, model, x)
    exact = Exact(inner)
    got = step(torch.compile(model, backend=exact, fullgraph=True), model, x)
    (done,) = exact.done
    held = [cast.exponent for cast in done.casts]
    assert len(held) == 9 and any(held)  # of three layers; the head stays high
    assert done.rescales or not all(cast.free for cast in done.casts)
    assert got.keys() == want.keys()
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    for name, value in want.items():
        largest = float(value.abs().max())
        torch.testing.assert_close(got[name], value, rtol=tight, atol=tight * largest, msg=name)


def test_exact_mode_holds_values_elsewhere(net: tuple[nn.Module, torch.Tensor]) -> None:
    """Its graph has the multiplications of the exponents, and no cast."""

    def use(joint: torch.fx.GraphModule, parameters: Any, values: Any) -> tuple[int, list[float]]:
        done = lower_products(joint, parameters, Formats(), values)
        without_casts(joint)
        calls = [node for node in joint.graph.nodes if node.op == "call_function"]
        assert not any(str(node.target).startswith("scaleprop.") for node in calls)
        return done.rescales, [node.args[1] for node in calls if isinstance(
            node.args[-1], float) and node.target is torch.ops.aten.mul.Tensor]

    ((rescales, factors),) = joint_of(*net, use=use)
    powers = [factor for factor in factors if math.frexp(factor)[0] == 0.5 and factor != 1.0]
    assert len(powers) >= rescales > 0


# --- training_overhead ---------------------------------------------------------------------------


def overhead(inductor: float, fp32: float, exact: float) -> dict[str, Any]:
    """A row, as ``measure`` gives it: three equal rounds, times in ms, compilation in s."""
    steps = {name: {"wall": [value / 1e3] * 3, "cpu": [value / 1e3] * 3} for name, value in
             (("inductor", inductor), ("fp32", fp32), ("exact", exact))}
    return {"steps": steps, "compile": {"inductor": [10.0, 20.0], "fp32": [15.0, 18.0],
                                        "exact": [29.0, 33.0]}}


def test_overhead_is_against_inductor() -> None:
    row = overhead(20.0, 21.0, 25.0)
    step_ratio, compiling = training_overhead.ratios(row, "fp32")
    assert step_ratio.median == pytest.approx(1.05) and compiling == pytest.approx(1.1)
    step_ratio, compiling = training_overhead.ratios(row, "exact")
    assert step_ratio.median == pytest.approx(1.25) and compiling == pytest.approx(31 / 15)


def test_the_overhead_table_says_what_is_within(tmp_path: Path) -> None:
    results = Results("overhead", tmp_path)
    results.add("good", {**overhead(20.0, 20.8, 22.0), "compile": {
        "inductor": [10.0], "fp32": [15.0], "exact": [20.0]}})
    results.add("bad", overhead(20.0, 21.2, 22.0))
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[-2].strip()
            for line in training_overhead.table(results).splitlines() if line.startswith("| ")}
    assert rows[("good", "fp32")] == rows[("good", "exact")] == "yes"
    assert rows[("bad", "fp32")] == "NO"  # a step of 1.06
    assert rows[("bad", "exact")] == "NO"  # compiles for 2.07 times as long


def test_another_loss_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.1)])
    monkeypatch.setitem(training_overhead.MODELS, "tiny", lambda: (nn.Linear(2, 2), {}))
    monkeypatch.setattr(training_overhead, "compiled_cold", lambda _: (1.0, next(losses)))
    with pytest.raises(ValueError, match="tiny, exact: the loss is off by"):
        training_overhead.measure("tiny", harness.QUICK, 1)


def test_another_gradient_is_no_measurement() -> None:
    same = [torch.tensor(1.0), torch.ones(3), torch.ones(2)]
    training_overhead.check("tiny", same, same)
    with pytest.raises(ValueError, match="tiny: gradient 1 is off by 1"):
        training_overhead.check("tiny", [*same[:2], torch.zeros(2)], same)
    with pytest.raises(ValueError, match="gradient 0 is off by nan"):
        training_overhead.check("tiny", [same[0], same[1] * math.nan, same[2]], same)


def test_every_candidate_takes_the_same_step() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu()).square().mean()

    torch.manual_seed(0)
    model, inputs = Tiny(), {"x": torch.randn(8, 16)}
    want = step(lambda x: model(x), model, inputs["x"])
    for name in ("inductor", "fp32", "exact"):
        torch._dynamo.reset()
        run = training_overhead.stepper(model, inputs, name)
        assert float(run()) == pytest.approx(float(want["loss"]), rel=1e-6)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, want[key], rtol=1e-4, atol=1e-6)


# --- joint_architectures -------------------------------------------------------------------------


def tiny() -> Sample:
    torch.manual_seed(0)
    return Sample(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)),
                  (torch.randn(3, 8),), {}, None)


def test_one_architecture_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its worker process does it, to a file."""
    monkeypatch.setitem(joint_architectures.ZOO, "tiny", tiny)
    path = tmp_path / "row.json"
    threads = torch.get_num_threads()
    try:
        assert joint_architectures.main(["--worker", "tiny", "eager", "--out", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    row = json.loads(path.read_text())
    for mode in joint_architectures.MODES:
        assert joint_architectures.passes(row, mode)
        found = row["modes"][mode]
        assert found["graphs"] == 1 and found["values"] >= 3 and found["rescales"] >= 1
        assert found["plain"]["of"] == found["plain"]["bit_equal"] == 6
    assert row["unruled"] == {}
    results = Results("joint", tmp_path)
    results.add("tiny | eager", row)
    results.add("lost | eager", {"error": "CaptureError: a | b"})
    shown = joint_architectures.table(results)
    assert "eager, exact mode: 1 of 2; eager, random exponents: 1 of 2" in shown
    assert "CaptureError: a \\| b" in shown


def test_a_turned_gradient_does_not_pass() -> None:
    """1 − cosine of a known angle, and the loss's relative error."""
    want = (torch.tensor(2.0), {"w": torch.tensor([1.0, 0.0]), "b": torch.ones(3)})
    got = (torch.tensor(2.1), {"w": torch.tensor([1.0, 1.0]), "b": torch.ones(3)})
    found = joint_architectures.compared(got, want)
    assert found["loss"] == pytest.approx(0.05, rel=1e-5)
    assert found["angle"] == pytest.approx(1 - 2**-0.5) and found["worst"] == "w"
    assert (found["bit_equal"], found["of"]) == (1, 2)
    row = {"modes": {"exact": {"plain": found}}}
    assert not joint_architectures.passes(row, "exact")
    with pytest.raises(ValueError, match=r"other gradients: \['b'\]"):
        joint_architectures.compared((got[0], {"w": got[1]["w"]}), want)


# --- learning_rate_transfer ----------------------------------------------------------------------


@pytest.mark.parametrize("best", [-5.0, -4.7, -5.4])
def test_the_best_rate_is_a_parabolas_lowest_point(best: float) -> None:
    losses = {e: 2 + 0.3 * (e - best) ** 2 for e in range(-8, -2)}
    assert learning_rate_transfer.best_exponent(losses) == pytest.approx(best)
    losses[-3] = math.nan  # diverged; far from the best
    losses[-8] = math.inf
    assert learning_rate_transfer.best_exponent(losses) == pytest.approx(best)


@pytest.mark.parametrize(("losses", "why"), [
    ({-2: 1.0, -1: 2.0, 0: 3.0}, r"2\^-2, is at an end of the grid"),
    ({-2: 3.0, -1: 2.0, 0: 1.0}, r"2\^0, is at an end"),
    ({-2: 3.0, -1: 2.0, 0: math.nan}, r"2\^-1, is at an end"),
    ({-2: math.nan, -1: math.inf}, "no learning rate gave a finite loss"),
])  # fmt: skip
def test_a_best_rate_at_the_end_is_unknown(losses: dict[int, float], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        learning_rate_transfer.best_exponent(losses)


def test_the_shift_is_between_the_widest_and_the_narrowest(tmp_path: Path) -> None:
    by_width = {width: {str(e): 1 + (e - best) ** 2 for e in range(-6, 1)}
                for width, best in (("1024", -4.5), ("128", -2.0), ("256", -3.0))}
    assert learning_rate_transfer.shift(by_width) == pytest.approx(2.0**-2.5)
    results = Results("rates", tmp_path)
    results.add("u-mup-fp32", {"steps": 9, "seeds": 1, "losses": by_width})
    shown = learning_rate_transfer.table(results)
    assert "9 steps, 1 seeds; best rate, widest ÷ narrowest: 0.18" in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("| 256 |")]
    assert row.split("|")[-2].strip() == "0.125"
    learning_rate_transfer.plot(results, tmp_path / "rates.svg")
    assert (tmp_path / "rates.svg").read_text().count("width ") >= 3


def test_a_best_rate_at_the_end_leaves_the_other_recipes_table(tmp_path: Path) -> None:
    results = Results("rates", tmp_path)
    results.add("fp32", {"steps": 9, "seeds": 1, "losses": {"128": {"-2": 1.0, "-1": 2.0}}})
    shown = learning_rate_transfer.table(results)
    assert "widest ÷ narrowest: not found" in shown and "2^-2, is at an end of the grid" in shown
