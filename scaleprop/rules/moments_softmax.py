"""Moments of softmax, attention and cross-entropy, and of their gradients.

What matters of a softmax over n scores is how concentrated it is: c = E[Σ p²], from 1/n (uniform)
to 1 (one score takes all). It is evaluated on random scores of the given deviation, which is exact
for normal ones; a value averaged with such weights keeps c of its variance and all of its mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from scaleprop.rules.moments import (
    Answer,
    Call,
    Moments,
    averaged,
    moments_rule,
    product,
    summed,
)

aten: Any = torch.ops.aten
_DRAWN = 65536  # scores


@dataclasses.dataclass(frozen=True)
class Concentration:
    """Of softmax over normal scores: squares = E[Σ p²]; flow = E[Σ p²(1 − 2p + Σ p²)], what comes
    through its gradient; log_sum: mean and rms of log Σ e^s."""

    squares: float
    flow: float
    log_sum: tuple[float, float]


def concentration(deviation: float, n: float, causal: bool = False) -> Concentration:
    """Over n scores; ``causal``: averaged over rows of 1 … n scores."""
    return _concentration(float(f"{deviation:.3g}"), max(1, round(n)), causal)


@functools.lru_cache(maxsize=4096)
def _concentration(deviation: float, n: int, causal: bool) -> Concentration:
    drawn = min(n, 8192)
    maker = torch.Generator().manual_seed(drawn)
    scores = torch.randn(max(4, _DRAWN // drawn), drawn, generator=maker, dtype=torch.float64)
    scores = deviation * scores
    e = torch.exp(scores - scores.amax(-1, keepdim=True))

    def total(x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(-1) if causal else x.sum(-1)

    sums = total(e).clamp_min(1e-300)
    squares, cubes = total(e**2) / sums**2, total(e**3) / sums**3
    log_sum = torch.log(sums) + scores.amax(-1, keepdim=causal) + math.log(n / drawn)
    ratio = drawn / n  # rows that long are not drawn: squares shrink as 1/n
    flow = (squares - 2 * cubes + squares**2).mean().item()
    return Concentration(squares.mean().item() * ratio, flow * ratio,
                         (log_sum.mean().item(), log_sum.square().mean().sqrt().item()))


def _row(call: Call, argument: Any, dim: int) -> int:
    shape = call.shape(argument)
    return shape[dim] if shape else 1


# -- softmax


@moments_rule(aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
def softmax(call: Call) -> Answer:
    """Mean 1/n, rms² = c/n; masked scores give 0."""
    x = call.of("self")
    n = _row(call, "self", call["dim"])
    if x.masked >= 1:
        return None
    c = concentration(math.sqrt(x.variance), n * (1 - x.masked)).squares
    return Moments(1 / n, math.sqrt(c / n), zeros=x.masked, nonnegative=True)


@moments_rule(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(call: Call) -> Answer:
    """x − log Σ e^x."""
    x = call.of("self")
    n = _row(call, "self", call["dim"])
    if x.masked >= 1:
        return None
    mean, _ = concentration(math.sqrt(x.variance), n * (1 - x.masked)).log_sum
    return Moments(-mean, math.hypot(mean, math.sqrt(x.variance)), masked=x.masked)


@moments_rule(aten.logsumexp.default)
def log_sum(call: Call) -> Answer:
    """log Σ e^x."""
    x = call.of("self")
    n = call.numel("self") / call.numel()
    if x.masked >= 1:
        return None
    mean, rms = concentration(math.sqrt(x.variance), n * (1 - x.masked)).log_sum
    spread = max(rms**2 - mean**2, 0.0)
    return Moments(mean + x.mean, math.sqrt((mean + x.mean) ** 2 + spread))


@moments_rule(aten._softmax_backward_data.default)
def softmax_back(call: Call) -> Answer:
    """p·(dy − Σ p·dy)."""
    dy, p = call.of("grad_output"), call.of("output")
    n = _row(call, "output", call["dim"])
    c = min(n * p.rms**2, 1.0)
    cubes = min(c**3 * n * (1 - p.zeros), c**1.5)  # Σ p³ of lognormal weights
    flow = max(c - 2 * cubes + c**2, 0.0)
    return Moments(0.0, math.sqrt(flow / n * dy.variance), zeros=p.zeros)


@moments_rule(aten._log_softmax_backward_data.default)
def log_softmax_back(call: Call) -> Answer:
    """dy − p·Σ dy. Where each row of dy has one element that is not 0, Σ dy is that."""
    dy, out = call.of("grad_output"), call.of("output")
    n = _row(call, "output", call["dim"])
    c = concentration(math.sqrt(out.variance), n).squares
    lone = n > 1 and dy.zeros >= 1 - 1.5 / n
    row = n * dy.rms**2 if lone else summed(dy, n).rms ** 2  # of Σ dy
    return Moments(0.0, math.sqrt(max(dy.rms**2 - 2 * row / n**2 + row * c / n, 0.0)))


# -- cross-entropy


_NONE, _MEAN = 0, 1  # reductions, as ATen numbers them


@moments_rule(aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
def likelihood(call: Call) -> Answer:
    """−x at the labels, averaged over n of them; and what was divided by."""
    x, n = call.of("self"), _labels(call)
    at = x.times(-1)
    found = at if call["reduction"] == _NONE else averaged(at, n) \
        if call["reduction"] == _MEAN else summed(at, n)
    return found, Moments.constant(n)


@moments_rule(aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
def likelihood_back(call: Call) -> Answer:
    """−dy, divided by n, at the labels; 0 elsewhere."""
    dy = call.of("grad_output")
    classes = call.numel("self") / _labels(call)
    at = dy.times(-1 / _labels(call) if call["reduction"] == _MEAN else -1)
    if call["weight"] is not None:
        at = product(at, call.of("weight"))
    return summed(at, 1 / classes)


def _labels(call: Call) -> float:
    return max(call.numel("target"), 1)


@moments_rule(aten.mse_loss_backward.default)
def squared_back(call: Call) -> Answer:
    """2·dy·(x − target), divided by n for a mean."""
    dy, x, target = (call.of(name) for name in ("grad_output", "self", "target"))
    mean = x.mean - target.mean
    gap = Moments(mean, math.sqrt(x.variance + target.variance + mean**2))
    n = call.numel("self") if call["reduction"] == _MEAN else 1
    return product(dy, gap).times(2 / n)


# -- attention


@dataclasses.dataclass(frozen=True)
class _Attention:
    """What one attention does: rows, keys and width; moments of q, k, v; its concentration."""

    rows: int
    keys: int
    width: int
    scale: float
    q: Moments
    k: Moments
    v: Moments
    causal: bool
    c: Concentration


def _attention(call: Call) -> _Attention:
    q, k, v = (call.of(name) for name in ("query", "key", "value"))
    rows, width = call.shape("query")[-2:]
    keys = call.shape("key")[-2]
    scale = call["scale"] or 1 / math.sqrt(width)
    # what k has in common moves a row's scores together, which softmax does not see
    square = width * q.rms**2 * k.variance * scale**2
    kept = 1.0
    if (given := call.arguments.get("attn_mask", call.arguments.get("attn_bias"))) is not None:
        mask = call.of(given)
        is_mask = given.meta["val"].dtype is torch.bool
        kept = 1 - mask.zeros if is_mask else 1 - mask.masked
        square += 0.0 if is_mask else mask.variance
    causal = bool(call["is_causal"])
    found = concentration(math.sqrt(square), max(keys * kept, 1.0), causal)
    return _Attention(rows, keys, width, scale, q, k, v, causal, found)


def _attended(found: _Attention, dropout: float) -> Moments:
    c = found.c.squares / (1 - dropout) if dropout < 1 else 0.0
    return Moments(found.v.mean, math.sqrt(found.v.variance * c + found.v.mean**2))


@moments_rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Answer:
    """Averages of v: its mean stays, c of its variance does."""
    found = _attention(call)
    return _attended(found, call["dropout_p"])


@moments_rule(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)
def attention_and_sums(call: Call) -> Answer:
    """The same, log Σ e^score, and what only backward reads."""
    found = _attention(call)
    besides = len(call.node.target._schema.returns) - 2  # type: ignore[union-attr]
    return (_attended(found, call["dropout_p"]), Moments(*found.c.log_sum), *(None,) * besides)


@moments_rule(
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
)
def attention_back(call: Call) -> tuple[Moments, ...]:
    """dq, dk, dv. dS = p∘(dO·(v − o)) sums to 0 over keys: what v or k have in common is lost."""
    found, dy = _attention(call), call.first()
    per_row = found.width * dy.rms**2 * found.v.variance * found.c.flow * found.scale**2
    share = found.rows / found.keys
    common = (2.0 if found.causal else 1.0) * share**2 * dy.mean**2  # early keys are read more
    return (
        Moments(0.0, math.sqrt(per_row * found.k.variance)),
        Moments(0.0, math.sqrt(share * per_row * found.q.rms**2)),
        Moments(share * dy.mean, math.sqrt(share * found.c.squares * dy.variance + common)),
    )


@moments_rule(aten._scaled_dot_product_efficient_attention_backward.default)
def attention_and_bias_back(call: Call) -> Answer:
    """The same, and dS, one for each score, as the gradient of what was added to the scores."""
    found, dy = _attention(call), call.first()
    square = found.width * dy.rms**2 * found.v.variance * found.c.flow / found.keys
    return (*attention_back(call), Moments(0.0, math.sqrt(square)))
