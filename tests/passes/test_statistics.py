"""Structure and findings are told from operators, and figures are those of plain PyTorch."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scaleprop
from scaleprop.backends.joint import capture_training
from scaleprop.passes.statistics import Measured, attention_entropy, measure
from scaleprop.passes.statistics.depth import COLLAPSED, GROWTH
from scaleprop.passes.statistics.lines import module_path
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
    seen = Measured.of(x, limits=(1.5,))
    assert (seen.count, seen.amax, seen.mean) == (6, 3.0, 0.5)
    assert seen.rms == pytest.approx(math.sqrt(14 / 4))
    assert seen.zeros == pytest.approx(1 / 6) and seen.masked == pytest.approx(2 / 6)
    assert seen.exponents == {0: 1, 1: 2} and seen.above == {1.5: 2 / 3}
    assert seen.below(1) == pytest.approx(1 / 3) and seen.below(0) == 0
    assert Measured.of(torch.empty(0)).count == 0
    assert Measured.of(torch.ones(3)).kurtosis is None
    normal = Measured.of(torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)))
    assert normal.kurtosis == pytest.approx(3, abs=0.05)
    tiny = Measured.of(torch.tensor([2.0**-149, 2.0**99]))
    assert tiny.exponents == {-149: 1, 99: 1}


@pytest.mark.parametrize(("name", "path"), [
    ("L['self']._modules['blocks']._modules['0'].up", "blocks.0.up"),
    ("G['m'].blocks.0.norm", "blocks.0.norm"),
    ("L['self']", ""),
    ("L['model']._modules['net'][0]", "net.0"),
])  # fmt: skip
def test_module_paths(name, path):
    assert module_path(name) == path
