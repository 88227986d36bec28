"""Token weights: against attention computed one number at a time, and whose attention it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.calibration import moments
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.solve_weights import SolveWeights
from scaleprop.passes.solving.attention import Attention, Attentions
from scaleprop.passes.solving.tokens import scaled_scores
from scaleprop.recipes import Recipe, Role

WIDTH, HEADS = 32, 4
RECIPE = Recipe(name="r", description="", roles={"fprop.w": Role(format="int4[row]*f32")})


def prepared(model: Any, *inputs: Any) -> Any:
    program = capture(model, inputs, {})
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=RECIPE)):
        program = step.run(program).program
    return program


# ------------------------------------------------------------------ scores become weights


def naive_weights(scores: list[float], low: float, high: float) -> list[float]:
    least, most = min(scores), max(scores)
    found = [high if most == least else low + (s - least) / (most - least) * (high - low)
             for s in scores]  # fmt: skip
    return [len(found) * r / sum(found) for r in found]


def test_scores_are_scaled_in_each_sequence():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 0.0, 9.0]])
    got = scaled_scores(scores, 0.005, 1.0)
    want = torch.tensor([naive_weights(row.tolist(), 0.005, 1.0) for row in scores])
    torch.testing.assert_close(got.float(), want)
    torch.testing.assert_close(got.mean(-1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(got[1], torch.ones(3, dtype=torch.float64))


# ------------------------------------------------------------------ attention by hand


def naive_concentration(
    q: Tensor, k: Tensor, scale: float | None = None, mask: Tensor | None = None,
    causal: bool = False,
) -> list[list[float]]:
    """Σ over heads and queries of softmax(q·k·scale + mask), for each batch and key; numbers only.

    q [B, H, Tq, D], k [B, Hk, Tk, D], mask [B, 1 or H, Tq, Tk] in floats.
    """
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    result = []
    for b in range(q.shape[0]):
        received = [0.0] * k.shape[2]
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = []
                for j in range(k.shape[2]):
                    score = float(q[b, h, i].double() @ k[b, h // group, j].double()) * factor
                    if mask is not None:
                        score += float(mask[b, h % mask.shape[1], i, j])
                    scores.append(-math.inf if causal and j > i else score)
                exps = [math.exp(score - max(scores)) for score in scores]
                for j, value in enumerate(exps):
                    received[j] += value / sum(exps)
        result.append(received)
    return result


class Plain(nn.Module):
    """An attention of given queries, keys, values and mask, in one of several spellings."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.out = nn.Linear(8, 8)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        attend = F.scaled_dot_product_attention
        match self.how:
            case "causal":
                y = attend(q, k, v, is_causal=True)
            case "added":
                y = attend(q, k, v, attn_mask=mask)
            case "boolean":
                y = attend(q, k, v, attn_mask=mask > -1, scale=0.5)
            case "shared":
                y = attend(q, k[:, :2], v[:, :2], enable_gqa=True)
            case _:
                scores = (q @ k.transpose(-1, -2)) / math.sqrt(8) + mask
                y = torch.softmax(scores, -1) @ v
        return self.out(y)


@pytest.mark.parametrize("how", ["causal", "added", "boolean", "shared", "spelt out"])
def test_concentration_is_that_of_the_definition(how: str):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=generator) for _ in range(3))
    mask = torch.randn(2, 1, 5, 5, generator=generator)
    program = prepared(Plain(how), q, k, v, mask)
    attention, = Attentions(program.module.graph)
    seen: dict[Any, Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    Watch(program.module).run(q, k, v, mask, enable_io_processing=False)
    got = attention.concentration({node: seen[node] for node in attention.reads}, 2)
    hidden = torch.where(mask > -1, 0.0, -math.inf)
    want = {
        "causal": lambda: naive_concentration(q, k, causal=True),
        "added": lambda: naive_concentration(q, k, mask=mask),
        "boolean": lambda: naive_concentration(q, k, 0.5, hidden),
        "shared": lambda: naive_concentration(q, k[:, :2]),
        "spelt out": lambda: naive_concentration(q, k, mask=mask),
    }[how]()
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------ H by hand


class Layer(nn.Module):
    """Pre-norm attention and a gated feed-forward; odd names, so that none can matter."""

    def __init__(self) -> None:
        super().__init__()
        self.zig, self.zag = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.all3 = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.wide, self.gate = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48)
        self.narrow = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor, notes: list[Tensor] | None = None) -> Tensor:
        b, t, _ = x.shape
        first = self.zig(x)
        q, k, v = (part.view(b, t, HEADS, -1).transpose(1, 2)
                   for part in self.all3(first).chunk(3, -1))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(b, t, WIDTH)
        x = x + self.merge(y)
        second = self.zag(x)
        third = F.silu(self.gate(second)) * self.wide(second)
        if notes is not None:
            notes += [torch.tensor(naive_concentration(q, k, causal=True)), first, y, second, third]
        return x + self.narrow(third)


class Stack(nn.Module):
    """Two layers, and a head on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, WIDTH)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def by_hand(self, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(what a group of linears reads, attention its tokens receive), in order."""
        x, found, concentration = self.table(ids), [], torch.empty(0)
        for layer in self.layers:
            notes: list[Tensor] = []
            x = layer(x, notes)
            concentration, *values = notes
            found += [(value, concentration) for value in values]
        return [*found, (x, concentration)]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 30, (2, size), generator=generator) for size in (6, 9)]


def moments_of(monkeypatch: pytest.MonkeyPatch, program: Any, **options: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    real = moments.SecondMoment.total

    def total(self: moments.SecondMoment) -> Tensor:
        seen.append(real(self))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(moments.SecondMoment, "total", total)
        SolveWeights(data=batches(), **options).run(program)
    return seen


def weighted_by_hand(
    model: Stack, scores_of: Callable[[Tensor, Tensor], list[list[float]]], low: float
) -> list[Tensor]:
    """H of each group, token by token."""
    found: list[Tensor] = []
    for ids in batches():
        for group, (value, concentration) in enumerate(model.by_hand(ids)):
            weights = [naive_weights(row, low, 1.0) for row in scores_of(value, concentration)]
            moment = torch.zeros(value.shape[-1], value.shape[-1], dtype=torch.float64)
            for sequence, row in zip(value.double(), weights, strict=True):
                for x, r in zip(sequence, row, strict=True):
                    moment += r * torch.outer(x, x)
            if group == len(found):
                found.append(moment)
            else:
                found[group] += moment
    return found


STRATEGIES = {
    "attention": lambda _, concentration: concentration.tolist(),
    "norm": lambda value, _: value.double().square().sum(-1).sqrt().tolist(),
    "first-n": lambda value, _: [[1.0] * 4 + [0.0] * (value.shape[1] - 4)] * value.shape[0],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_second_moments_are_weighted_token_by_token(strategy: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = Stack().eval()
    program = prepared(model, batches()[0])
    first = {"first": 4} if strategy == "first-n" else {}
    got = moments_of(monkeypatch, program, strategy=strategy, r_min=0.1, sequential=False, **first)
    want = weighted_by_hand(model, STRATEGIES[strategy], 0.1)
    assert len(got) == len(want) == 9
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    uniform = moments_of(monkeypatch, program, sequential=False)
    for weighted, plain in zip(got, uniform, strict=True):
        assert float((weighted - plain).norm() / plain.norm()) > 0.02


def test_a_layer_without_its_queries_and_keys_is_weighted_too(monkeypatch: pytest.MonkeyPatch):
    """Attention is noted as the walk passes it: nothing that it reads is alive afterwards."""
    torch.manual_seed(0)
    model = Stack().eval()
    program = capture(model, (batches()[0],), {})
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=RECIPE, exclude=("*all3*",))):
        program = step.run(program).program
    with torch.no_grad():
        got = moments_of(monkeypatch, program, strategy="attention", r_min=0.1, sequential=False)
        want = weighted_by_hand(model, STRATEGIES["attention"], 0.1)
    for mine, theirs in zip(got, [*want[1:4], *want[5:]], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


# ------------------------------------------------------------------ whose attention


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Positions(nn.Module):
    """Rotary positions, shared keys and values, attention spelt out, feed-forward beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.norm(x)
        angles = torch.arange(t)[:, None] * torch.ones(8)
        cos, sin = angles.cos(), angles.sin()
        q = rotated(self.q(y).view(b, t, 4, 8).transpose(1, 2), cos, sin)
        k = rotated(self.k(y).view(b, t, 2, 8).transpose(1, 2), cos, sin)
        v = self.v(y).view(b, t, 2, 8).transpose(1, 2)
        k, v = (part[:, :, None].expand(b, 2, 2, t, 8).reshape(b, 4, t, 8) for part in (k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) * 0.3, -1)
        a = (weights @ v).transpose(1, 2).reshape(b, t, WIDTH)
        return x + self.out(a) + self.down(F.gelu(self.up(y)))


class Crossed(nn.Module):
    """Self-attention on each side, then one side attends to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.after = nn.Linear(WIDTH, WIDTH)
        self.pooled = nn.Linear(WIDTH, 3)

    def attend(self, at: int, x: Tensor, other: Tensor) -> Tensor:
        q, k, v = (layer(part)[:, None] for layer, part in
                   zip(self.into[3 * at :], (x, other, other), strict=False))  # fmt: skip
        return x + self.out[at](F.scaled_dot_product_attention(q, k, v)[:, 0])

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x, other = torch.tanh(x), torch.tanh(other)
        x, other = self.attend(0, x, x), self.attend(1, other, other)
        y = self.attend(2, torch.tanh(x), torch.tanh(other))
        return self.pooled(torch.tanh(self.after(torch.tanh(y))).mean(1))


def choices(model: Any, *inputs: Tensor) -> dict[str, int | str]:
    """Weight → which attention of the graph, counted from 0, weighs what it reads; or why none."""
    graph = prepared(model, *inputs).module.graph
    attentions = Attentions(graph)
    order = [attention.node for attention in attentions]
    found: dict[str, int | str] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        chosen = attentions.of(node.args[0])
        name = str(node.args[1].target).removesuffix(".weight")
        found[name] = order.index(chosen.node) if isinstance(chosen, Attention) else chosen
    return found


def test_rotary_positions_shared_keys_and_parallel_branches():
    found = choices(nn.Sequential(Positions(), Positions()), torch.randn(2, 6, WIDTH))
    for layer in (0, 1):
        inside = {name.split(".")[1]: choice for name, choice in found.items()
                  if name.startswith(str(layer))}  # fmt: skip
        assert {inside[name] for name in ("q", "k", "v", "up", "out")} == {layer}
    assert found["1.down"] == 0  # nothing of its own layer's attention reaches it
    assert isinstance(found["0.down"], str)


@pytest.mark.parametrize("fixed", [False, True])
def test_attention_to_another_sequence(fixed: bool):
    """With fixed, equal sizes, only the graph tells one sequence's tokens from the other's."""
    inputs = torch.randn(2, 6, WIDTH), torch.randn(2, 6, WIDTH)
    found = choices(torch.export.export(Crossed(), inputs) if fixed else Crossed(), *inputs)
    names = [[f"into.{3 * at + k}" for k in range(3)] for at in range(3)]
    assert [found[name] for name in names[0]] == [0, 0, 0]
    assert [found[name] for name in names[1]] == [1, 1, 1]
    assert [found[name] for name in names[2]] == [0, 2, 2]  # queries: their own self-attention
    assert found["out.0"] == 0 and found["out.1"] == 1
    assert found["out.2"] == found["after"] == 0  # what was attended to has other tokens
    assert "no attention has the tokens" in str(found["pooled"])


def test_where_there_is_none_tokens_count_alike_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    data = [torch.randn(3, 5, 8)]
    reports = [scaleprop.compile(model, data[0], recipe=RECIPE, backend="reference",
                                 calibration=data, passes=[f"solve-weights{{strategy={name}}}"])
               for name in ("attention", "uniform")]  # fmt: skip
    notes = " ".join(reports[0].report.notes)
    assert "weighted uniformly: the graph has no attention" in notes
    assert "uniformly" not in " ".join(reports[1].report.notes)
    left, right = (dict(report.program.module.named_buffers()) for report in reports)
    assert left and all(torch.equal(left[name], right[name]) for name in left)


@torch.no_grad()
def test_attended_tokens_come_out_closer():
    """RSQ's aim: less error where attention is, paid for elsewhere."""
    torch.manual_seed(0)
    model = Layer().eval()
    with torch.no_grad():  # large keys for a few kinds of tokens: sinks, as in trained models
        model.all3.weight[WIDTH : 2 * WIDTH] *= 4
    kinds = torch.randn(6, WIDTH)
    generator = torch.Generator().manual_seed(1)
    data = [kinds[torch.randint(0, 6, (4, 20), generator=generator)]
            + 0.3 * torch.randn(4, 20, WIDTH, generator=generator) for _ in range(3)]  # fmt: skip

    def error(strategy: str) -> float:
        program = prepared(model, data[0])
        options = SolveWeights(data=data, strategy=strategy, sequential=False)  # type: ignore[arg-type]
        solved = options.run(program).program
        meta = {str(n.args[1].target): n.meta["scaleprop.solved"]
                for n in solved.module.graph.nodes if "scaleprop.solved" in n.meta}  # fmt: skip
        total = 0.0
        for x in data:
            notes: list[Tensor] = []
            model(x, notes)
            weights = scaled_scores(notes[0], 0.005, 1.0)
            for name, value in (("all3", notes[1]), ("merge", notes[2]), ("narrow", notes[4])):
                wrong = getattr(model, name).weight - meta[f"{name}.weight"].dequantize()
                total += float(((value @ wrong.T).square().sum(-1) * weights).sum())
        return total

    assert error("attention") < 0.97 * error("uniform")
