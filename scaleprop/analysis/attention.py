"""How attention is spread over the keys, and how large the values are that it brings.

For probabilities P [sequence, head, query, key], one number per sequence and key::

    received_j = mean over heads and queries of P_ij          1/T for uniform attention, no mask
    uniform_j  = mean over queries of 1/|keys that i may see|, where it may see j; else 0

A key is a *sink* where received_j ≥ 0.1 (An et al., arXiv:2502.06415: their code takes the keys
whose attention, summed over the queries and averaged over the heads, is a tenth of the sequence's
length) and received_j ≥ 4 uniform_j: in a short or causal sequence the first keys get as much by
the mask alone. A sink *drains* where its value is small beside the sequence's median: the same
paper, and arXiv:2410.13835, which names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx

from scaleprop.calibration.observer import Call
from scaleprop.errors import describe
from scaleprop.passes.canonicalise.attention import products_around
from scaleprop.rules import contraction_of

# masks come as −∞, as the least float, as −10⁴: no score of a model is as low
_MASKED = -9e3
_CELLS = 2**22  # probabilities computed at once
_FEW = 8  # queries that a sequence must have to say anything


class AttentionTally:
    """What one attention's keys received, over all batches; positions grow with the sequences.

    hits, drained, sequences: [T], in how many sequences the key was a sink, one that drains, or
    there. received, norms: [T], sums over sequences; ``with_values`` counts those of ``norms``.
    """

    def __init__(self, node: torch.fx.Node, share: float, uniform: float, drain: float) -> None:
        self.node = node
        self._share, self._uniform, self._drain = share, uniform, drain
        self.hits = torch.zeros(0)
        self.drained = torch.zeros(0)
        self.sequences = torch.zeros(0)
        self.received = torch.zeros(0)
        self.above = torch.zeros(0)  # largest received ÷ uniform seen
        self.norms = torch.zeros(0)
        self.with_values = torch.zeros(0)
        self.short = 0
        self._sinks: torch.Tensor | None = None

    def add_attention(self, blocks: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Count one batch, given as blocks of queries: probabilities, and which keys are allowed,
        both [sequence, head, query, key]."""
        received = uniform = queries = torch.zeros(())
        for weights, allowed in blocks:
            seen = allowed.sum(-1, keepdim=True)
            weights = torch.where(allowed, weights, 0.0)  # NaN where a query may see nothing
            received = received + weights.mean(1).sum(1)
            uniform = uniform + (allowed / seen.clamp_min(1)).mean(1).sum(1)
            queries = queries + (seen > 0).float().mean(1).sum((1, 2))
        enough = queries >= _FEW
        self.short += int((~enough).sum())
        received = (received / queries.clamp_min(1)[:, None])[enough].cpu()
        uniform = (uniform / queries.clamp_min(1)[:, None])[enough].cpu()
        above = received / uniform.clamp_min(1e-30)
        sinks = (received >= self._share) & (above >= self._uniform) & (uniform > 0)
        self._sinks = torch.zeros(enough.shape[0], sinks.shape[1], dtype=torch.bool)
        self._sinks[enough.cpu()] = sinks
        if sinks.shape[0]:
            self._grow(sinks.shape[1])
            _add(self.hits, sinks.sum(0))
            _add(self.sequences, (uniform > 0).sum(0))
            _add(self.received, received.sum(0))
            self.above[: sinks.shape[1]] = torch.maximum(
                self.above[: sinks.shape[1]], torch.where(sinks, above, 0.0).amax(0))

    def add_values(self, values: torch.Tensor) -> None:
        """Count the values [sequence(, head), key, width] of the batch that was just added."""
        if self._sinks is None:
            return
        sinks, self._sinks = self._sinks, None
        sequences, keys = sinks.shape
        norms = values.detach().float().norm(dim=-1).cpu()
        if not sequences or norms.shape[-1] != keys or norms.numel() % (sequences * keys):
            return
        norms = norms.reshape(sequences, -1, keys).mean(1)
        norms = norms / norms.median(1, keepdim=True).values.clamp_min(1e-30)
        self._grow(keys)
        _add(self.norms, norms.sum(0))
        _add(self.with_values, torch.full((keys,), float(sequences)))
        _add(self.drained, (sinks & (norms <= self._drain)).sum(0))

    def _grow(self, keys: int) -> None:
        for name in ("hits", "drained", "sequences", "received", "above", "norms", "with_values"):
            held: torch.Tensor = getattr(self, name)
            if held.numel() < keys:
                setattr(self, name, torch.cat([held, torch.zeros(keys - held.numel())]))


def _add(total: torch.Tensor, part: torch.Tensor) -> None:
    total[: part.numel()] += part


def attentions(
    graph: torch.fx.Graph, make: Callable[[torch.fx.Node], AttentionTally]
) -> tuple[list[AttentionTally], dict[str, Call]]:
    """A tally for each attention of ``graph``, and the calls that fill them.

    Found by operator: fused attention; or a softmax over the last axis between two products.
    """
    tallies: list[AttentionTally] = []
    calls: dict[str, Call] = {}
    for node in graph.nodes:
        contraction = contraction_of(node)
        if contraction is not None and contraction.kind == "attention":
            tallies.append(tally := make(node))
            calls[node.name] = _fused(node, tally)
        elif (products := products_around(node)) is not None and _over_keys(node):
            tallies.append(tally := make(node))
            calls[node.name] = _spelled_out(tally)
            if _weighs_first(products[1], node):
                calls[products[1].name] = _values_of(tally)
    return tallies, calls


def _over_keys(softmax: torch.fx.Node) -> bool:
    value = softmax.meta.get("val")
    axis = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim")
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and axis in (-1, value.dim() - 1)


def _weighs_first(product: torch.fx.Node, softmax: torch.fx.Node) -> bool:
    """Whether the weights are the left operand: then the right one's rows are the values."""
    contraction = contraction_of(product)
    if contraction is None or contraction.operands[0].argument != 0:
        return False
    reached, pending = set[torch.fx.Node](), [product.args[0]]
    while pending:
        found = pending.pop()
        if found is softmax:
            return True
        if isinstance(found, torch.fx.Node) and found not in reached and len(reached) < 24:
            reached.add(found)
            pending += found.all_input_nodes
    return False


def _spelled_out(tally: AttentionTally) -> Call:
    def call(args: tuple[Any, ...], _kwargs: dict[str, Any], weights: torch.Tensor) -> None:
        tally.add_attention(iter([(_four(weights).float(), _four(args[0]) > _MASKED)]))

    return call


def _values_of(tally: AttentionTally) -> Call:
    def call(args: tuple[Any, ...], _kwargs: dict[str, Any], _result: Any) -> None:
        tally.add_values(args[1])

    return call


def _fused(node: torch.fx.Node, tally: AttentionTally) -> Call:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]

    def call(args: tuple[Any, ...], kwargs: dict[str, Any], _result: Any) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given[name].detach() for name in ("query", "key", "value"))
        mask = given.get("attn_mask")
        mask = given.get("attn_bias") if mask is None else mask
        tally.add_attention(_blocks(
            _four(q), _four(k), mask, bool(given.get("is_causal")), given.get("scale")))
        tally.add_values(v)

    return call


def _blocks(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """softmax(q·kᵀ·scale + mask), some queries at a time, and which keys they may see."""
    q, k = q.float(), k.float()
    if q.shape[1] != k.shape[1]:  # groups of heads share their keys
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    count, keys = q.shape[2], k.shape[2]
    if mask is not None:
        mask = _four(mask).expand(*q.shape[:2], count, keys)
    step = max(_CELLS // max(q.shape[0] * q.shape[1] * keys, 1), 1)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        scores = q[:, :, rows] @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        if causal:
            allowed = allowed.tril(start)
        if mask is not None:
            part = mask[:, :, rows]
            allowed = allowed & (part if part.dtype == torch.bool else part > _MASKED)
            scores = scores if part.dtype == torch.bool else scores + part
        yield scores.masked_fill(~allowed, -math.inf).softmax(-1), allowed


def _four(x: torch.Tensor) -> torch.Tensor:
    """[sequence, head, row, column]: what has no heads has one."""
    while x.dim() < 3:
        x = x[None]
    if x.dim() == 3:
        return x[:, None]
    return x.flatten(0, -4)


def describe_short(tally: AttentionTally) -> str:
    """Why sequences of one attention were not judged."""
    return (f"{describe(tally.node)}: {tally.short} sequences have fewer than {_FEW} queries; "
            "their attention was not judged")
