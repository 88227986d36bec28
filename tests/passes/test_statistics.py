"""Structure and findings are told from operators, and figures are those of plain PyTorch."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import scaleprop
from scaleprop.backends.joint import capture_training
from scaleprop.passes.outline import module_path
from scaleprop.passes.statistics import Measured, attention_entropy, measure
from scaleprop.passes.statistics.depth import COLLAPSED, GROWTH
from scaleprop.passes.statistics.measure import own_random_state
from scaleprop.passes.statistics.structure import Structure, stream

LOGGER = logging.getLogger("a model")


def loss_fn(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


class Stack(nn.Module):
    """Residual branches around two linears, with norms where ``placement`` says."""

    def __init__(self, placement: str, depth: int = 3, width: int = 16, gain: float = 1.0) -> None:
        super().__init__()
        self.placement = placement
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ends = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        with torch.no_grad():
            for down in self.downs:
                down.weight *= gain
                down.bias *= gain

    def forward(self, x):
        for up, down, norm, end in zip(self.ups, self.downs, self.norms, self.ends, strict=True):
            h = norm(x) if "pre" in self.placement else x
            h = down(F.silu(up(h)))
            h = end(h) if "branch" in self.placement else h
            x = x + F.dropout(h, 0.1)
            x = norm(x) if self.placement == "post" else x
        return x


def structure_of(model: nn.Module, *inputs: torch.Tensor) -> Structure:
    step = capture_training(model, inputs, {}, loss_fn)
    run = measure(step.joint, step.inputs, step.parameters)
    return Structure(step.joint.graph, step.parameters, run.backward)


@pytest.mark.parametrize("placement", ["pre", "post", "pre and branch", "branch", "none"])
def test_norms_are_found_where_they_are(placement):
    structure = structure_of(Stack(placement), torch.randn(4, 5, 16))
    found = structure.residuals()
    assert [residual.placement for residual in found] == [placement] * 3
    (chain,) = stream(found, structure)
    assert chain == found


class RMSInParts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        y = x.double()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.gain * y.to(x.dtype)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = RMSInParts(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.layer(self.norm(x))


def test_a_norm_in_parts_is_one():
    (found,) = structure_of(Parts(), torch.randn(4, 8)).residuals()
    assert found.placement == "pre"


class NoResidual(nn.Module):
    """Sums that look like residuals: tanh-GELU, masks, positions, low-rank branches, gates."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.low, self.back = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8)
        self.places = nn.Parameter(torch.randn(6, 8))
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = x + self.places.expand(len(x), 6, 8)
        h = self.layer(x) + self.back(self.low(x))
        h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h.pow(3))))
        h = h + h * self.gain
        scores = h @ h.mT
        scores = scores + torch.full((6, 6), -1e30).triu(1).expand(len(x), 6, 6)
        return scores.softmax(-1) @ h


def test_other_sums_are_no_residuals():
    assert structure_of(NoResidual(), torch.randn(4, 6, 8)).residuals() == []


def test_a_convolutions_residual_is_one():
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(x + self.norm(self.conv(x)))

    model = nn.Sequential(nn.Conv2d(4, 4, 1), Conv(), Conv())
    structure = structure_of(model, torch.randn(2, 4, 6, 6))
    found = structure.residuals()
    assert [residual.placement for residual in found] == ["branch", "branch"]
    assert stream(found, structure) == [found]  # through the activation between them


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.stack = nn.Linear(16, 16), Stack("pre")

    def forward(self, x):
        LOGGER.warning("a model that logs")
        return self.stack(F.dropout(self.first(x), 0.1))


def test_dropout_before_the_first_block_hides_no_norm():
    structure = structure_of(Dropped(), torch.randn(4, 16))
    assert [residual.placement for residual in structure.residuals()] == ["pre"] * 3


def finding(report, name: str):
    (found,) = [f for f in report.findings if f.name == name]
    return found


def test_growth_of_the_stream_is_reported_with_its_figures():
    x = torch.randn(64, 16)
    for gain, warns in ((1.0, False), (12.0, True)):
        torch.manual_seed(0)
        model = Stack("pre", depth=4, gain=gain).eval()
        found = finding(scaleprop.analyze(model, x, loss_fn=loss_fn), "residual-growth")
        want = [float(x.var(correction=0))]
        y = x
        with torch.no_grad():
            for up, down, norm in zip(model.ups, model.downs, model.norms, strict=True):
                torch.manual_seed(3)
                y = y + F.dropout(down(F.silu(up(norm(y)))), 0.1)
                want.append(float(y.var(correction=0)))
        for got, expected in zip(found.figures["variance"], want, strict=True):
            assert got == pytest.approx(expected, rel=0.15)  # dropout draws other masks
        assert found.warning == warns == (want[-1] / want[0] > GROWTH)
        assert "arXiv:2502.05795" in found.advice and len(found.where) == 4


def test_branches_that_fade_are_reported():
    torch.manual_seed(0)
    report = scaleprop.analyze(Stack("none", gain=0.01), torch.randn(8, 16), loss_fn=loss_fn)
    assert finding(report, "fading-blocks").warning
    placed = finding(report, "norm-placement")
    assert placed.warning and "arXiv:1901.09321" in placed.advice
    quiet = scaleprop.analyze(Stack("pre"), torch.randn(8, 16), loss_fn=loss_fn)
    assert not [f for f in quiet.findings if f.name == "fading-blocks"]


class Attention(nn.Module):
    def __init__(self, sharpness: float, fused: bool, causal: bool) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48, bias=False)
        self.fused, self.causal = fused, causal
        with torch.no_grad():
            self.project.weight.normal_(generator=torch.Generator().manual_seed(0))
            self.project.weight[:16] *= sharpness

    def heads(self, x):
        return (part.unflatten(-1, (4, 4)).transpose(1, 2)
                for part in self.project(x).chunk(3, -1))

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = q @ k.mT / 2
        if self.causal:
            scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
        return F.dropout(scores.softmax(-1), 0.0) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharpness", [0.01, 1000.0])
def test_entropy_of_attention_is_that_of_its_rows(sharpness, fused, causal):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    model = Attention(sharpness, fused, causal)
    found = finding(scaleprop.analyze(model, x, loss_fn=loss_fn), "attention-entropy")
    q, k, _ = (h.double() for h in model.heads(x))
    scores = q @ k.mT / 2
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    p = scores.softmax(-1)
    entropy = -torch.where(p > 0, p * p.clamp_min(1e-300).log(), 0.0).sum(-1)
    keys = (scores > -math.inf).sum(-1).double()
    for head in range(4):
        counted = keys[:, head] > 1
        want = (entropy[:, head][counted] / keys[:, head][counted].log()).mean()
        assert found.figures["by_head"][head] == pytest.approx(float(want), abs=1e-3)
    assert found.warning == (sharpness > 1) == (min(found.figures["by_head"]) < COLLAPSED)
    assert "arXiv:2303.06296" in found.advice


def test_a_losss_softmax_is_no_attention():
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).softmax(-1)

    report = scaleprop.analyze(Softmax(), torch.randn(2, 3, 4), loss_fn=loss_fn)
    assert not [f for f in report.findings if f.name == "attention-entropy"]


def test_shared_keys_have_entropy_too():
    node = torch.fx.Graph().call_function(
        torch.ops.aten.scaled_dot_product_attention.default, ())
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    entropies = attention_entropy(node, None, (q, k, k), {"enable_gqa": True})
    alone = attention_entropy(node, None, (q, k.repeat_interleave(2, 1), k), {})
    assert entropies == alone and entropies is not None and len(entropies) == 4


def test_measured_figures():
    x = torch.tensor([0.0, 1.0, -2.0, 3.0, -math.inf, torch.finfo(torch.float32).min])
    seen = Measured.of(x, limits=(1.5,), masks=True)
    assert (seen.count, seen.amax, seen.mean) == (6, 3.0, 0.5)
    assert seen.rms == pytest.approx(math.sqrt(14 / 4))
    assert seen.zeros == pytest.approx(1 / 6) and seen.masked == pytest.approx(2 / 6)
    assert seen.exponents == {0: 1, 1: 2} and seen.above == {1.5: 2 / 3}
    assert seen.below(1) == pytest.approx(1 / 3) and seen.below(0) == seen.nonfinite == 0
    assert Measured.of(torch.empty(0)).count == 0
    assert Measured.of(torch.ones(3)).kurtosis is None
    normal = Measured.of(torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)))
    assert normal.kurtosis == pytest.approx(3, abs=0.05)
    tiny = Measured.of(torch.tensor([2.0**-149, 2.0**99]))
    assert tiny.exponents == {-149: 1, 99: 1}


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double])
def test_what_masks_nothing_counts(dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor([0.0, 1.0, -most, most / 2, math.inf, -math.inf, math.nan, 3.0], dtype=dtype)
    finite = x[x.isfinite()].double()
    for masks, counted, masked in ((False, finite, 0), (True, finite[finite > -most], 2)):
        seen = Measured.of(x, (448.0, 1.0), masks)
        unit = float(counted.abs().max())
        assert seen.amax == unit and seen.masked == masked / 8
        assert seen.rms / unit == pytest.approx(float((counted / unit).square().mean().sqrt()))
        assert seen.mean / unit == pytest.approx(float((counted / unit).mean()))
        assert seen.nonfinite == (2 if masks else 3) / 8
        live = 8 - 1 - masked  # one is 0
        assert seen.above == {448.0: (live - 2) / live, 1.0: (live - 1) / live}
        assert seen.below(1) == pytest.approx(1 / live)
    nothing = Measured.of(torch.full((3,), math.nan, dtype=dtype), (1.0,))
    assert (nothing.nonfinite, nothing.above, nothing.masked) == (1.0, {1.0: 1.0}, 0.0)


def masks_of(function, *inputs: torch.Tensor) -> dict[str, float]:
    """Operators whose values are masked somewhere → their shares, in a step on a learned x."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(inputs[0])

        def forward(self, *more):
            return function(self.x, *more)

    step = capture_training(Model(), inputs[1:] or (torch.ones(1),), {}, loss_fn)
    run = measure(step.joint, step.inputs, step.parameters)
    return {str(node.target).removeprefix("aten."): run.measured[node].masked
            for node in run.measured if node in run.masks}


HIDDEN = torch.ones(4, 4, dtype=torch.bool).triu(1)  # 6 of 16


def test_masks_are_told_by_where_they_go():
    lowest = torch.finfo(torch.float).min
    x = torch.randn(4, 4)
    filled = masks_of(lambda x, _: x.masked_fill(HIDDEN, -math.inf).softmax(-1), x)
    assert filled == {"masked_fill.Scalar": 6 / 16}
    for low in (lowest, -math.inf):
        assert masks_of(lambda x, m: (x + m).softmax(-1), x, torch.zeros(4, 4).masked_fill(
            HIDDEN, low))["add.Tensor"] == 6 / 16
    made = masks_of(lambda x, keep: (x + (1 - keep) * lowest).softmax(-1), x, (~HIDDEN).float())
    assert made["mul.Tensor"] == made["add.Tensor"] == 6 / 16
    found = masks_of(lambda x, _: torch.where(HIDDEN, -math.inf, x)[:, :2].softmax(-1), x)
    assert found["where.self"] == 6 / 16 and found["slice.Tensor"] == 1 / 8
    found = masks_of(lambda x, _: F.log_softmax(torch.cat(
        [x, torch.full((4, 4), lowest).triu(1)]), -1)[:4], x)
    assert found["triu.default"] == 6 / 16 and found["cat.default"] == 6 / 32


def test_what_masks_no_softmax_is_no_mask():
    x = torch.randn(4, 4)
    low = torch.full((4, 4), -math.inf)
    assert masks_of(lambda x, m: (x + m).exp(), x, low.triu(1)) == {}
    assert masks_of(lambda x, m: torch.maximum(x, m), x, low) == {}
    # what a parameter leads to is computed, not put there, wherever it goes
    assert masks_of(lambda x, _: (x * -1e38).softmax(-1), x.abs()) == {}
    assert masks_of(lambda x, _: (x @ x * 2).softmax(-1), torch.full((4, 4), 1e38).triu()) == {}
    # nor are +∞ and NaN
    for bad in (math.inf, math.nan):
        assert masks_of(lambda x, m: (x + m).softmax(-1), x, torch.full((4, 4), bad)) == {}


def test_random_numbers_are_the_callers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # where fork_rng warns, unasked
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with own_random_state(torch.fx.Graph(), [torch.ones(2), 3]):
            torch.rand(5)
    assert torch.equal(torch.get_rng_state(), state)
    forked = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda *args, **kinds: forked.append(
        (args, kinds)))
    graph = torch.fx.Graph()
    graph.placeholder("x").meta["val"] = _on("cuda:1")
    own_random_state(graph, [torch.ones(2), _on("cuda:0"), _on("meta")])
    assert forked == [(([torch.device("cuda:0"), torch.device("cuda:1")],),
                       {"device_type": "cuda"})]


def _on(device: str) -> torch.Tensor:
    """A tensor that says it is there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(2, device=device)


@pytest.mark.parametrize(("name", "path"), [
    ("L['self']._modules['blocks']._modules['0'].up", "blocks.0.up"),
    ("G['m'].blocks.0.norm", "blocks.0.norm"),
    ("L['self']", ""),
    ("L['model']._modules['net'][0]", "net.0"),
])  # fmt: skip
def test_module_paths(name, path):
    assert module_path(name) == path
