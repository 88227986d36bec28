"""Which attention tells how much the tokens of a layer's input count, found from the graph alone.

For layers that read x [..., T, K]:

1. x becomes keys or values: the attention that one of them feeds, no linear operator in between.
   Its keys are x's tokens.
2. x comes after attention: the nearest one whose queries' tokens x's are, if it is a
   self-attention: its queries and keys come, token by token, from one value that a linear reads.

Tokens are followed through the operators by the axes that their rules say survive. Where neither
holds (a vision tower's pooled output, tokens merged with the batch) there is no such attention.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.passes.canonicalise.attention import ATTENTION
from scaleprop.passes.canonicalise.match import argument, sizes
from scaleprop.rules import axes, contraction_of, rule_for

aten: Any = torch.ops.aten
_FUSED: Any = aten.scaled_dot_product_attention.default
_VALUES = "weights × values"  # the label of softmax's product with the values

# operators that cut, join or pick along one dimension: where it is among the arguments
_ALONG: Mapping[Any, int] = {
    aten.slice.Tensor: 1,
    aten.cat.default: 1,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.chunk.default: 2,
    aten.select.int: 1,
    aten.unbind.int: 1,
}
_PICKS = (aten.select.int, aten.unbind.int)  # the dimension is gone afterwards

Axis = tuple[torch.fx.Node, int]  # a value, and an axis of it counted from 0


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: ``node`` makes the weighted values."""

    node: torch.fx.Node

    @property
    def reads(self) -> list[torch.fx.Node]:
        """What its weights are found from: queries, keys and mask; or they themselves."""
        places = (0, 1, 3) if self.node.target is _FUSED else (0,)
        found = [argument(self.node, place, "attn_mask") for place in places]
        return [node for node in found if isinstance(node, torch.fx.Node)]

    @property
    def keys(self) -> list[Axis]:
        """The axes that tell keys apart: of keys and values, or of weights and values."""
        keys = self.node.args[1] if self.node.target is _FUSED else self.node.args[0]
        values = self.node.args[2] if self.node.target is _FUSED else self.node.args[1]
        last = 2 if self.node.target is _FUSED else 1
        return [(node, len(sizes(node)) - back) for node, back in ((keys, last), (values, 2))
                if isinstance(node, torch.fx.Node)]  # fmt: skip

    @property
    def queries(self) -> Axis:
        """The axis that tells queries apart."""
        node: Any = self.node.args[0]
        return node, len(sizes(node)) - 2

    def fits(self, x: torch.fx.Node) -> bool:
        """Whether its batch and keys have the sizes of x [..., T, K]'s batch and tokens."""
        key, axis = self.keys[0]
        size, shape = sizes(key), sizes(x)
        lead = len(shape) - 2
        return (
            0 <= lead <= len(size) - 2
            and all(map(axes.same_size, size[:lead], shape[:lead]))
            and axes.same_size(size[axis], shape[-2])
        )

    def concentration(self, values: Mapping[torch.fx.Node, torch.Tensor], rank: int) -> Any:
        """Attention that each key receives, Σ over heads and queries: [..., T], ``rank`` axes.

        values: those of ``reads``.
        """
        weights = self._weights(values).sum(-2)
        lead = weights.shape[: rank - 1]
        return weights.reshape(*lead, -1, weights.shape[-1]).sum(-2)

    def _weights(self, values: Mapping[torch.fx.Node, torch.Tensor]) -> torch.Tensor:
        """softmax(q·kᵀ·scale + mask) [..., queries, keys] in float32; 0 where all is masked."""
        node = self.node
        q: Any = node.args[0]
        if node.target is not _FUSED:
            return values[q].float()
        k: Any = node.args[1]
        query, key = values[q].float(), values[k].float()
        if query.dim() > 2 and key.shape[-3] != query.shape[-3]:  # heads share keys
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scale = argument(node, 6, "scale")
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        mask = argument(node, 3, "attn_mask")
        if isinstance(mask, torch.fx.Node):
            given = values[mask]
            hidden = given.logical_not() if given.dtype == torch.bool else None
            scores = scores + given if hidden is None else scores.masked_fill(hidden, -math.inf)
        if argument(node, 5, "is_causal", False):
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        return scores.softmax(-1).nan_to_num(0.0)


class Attentions:
    """The attentions of a graph, and which of them tells about which layer's tokens."""

    def __init__(self, graph: torch.fx.Graph) -> None:
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._found = {node: Attention(node) for node in graph.nodes if _is_attention(node)}
        self._feeds: dict[torch.fx.Node, list[Attention]] = {}
        for attention in self._found.values():
            for source in self._direct_sources(attention.keys):
                self._feeds.setdefault(source, []).append(attention)
        self._selfish: dict[torch.fx.Node, bool] = {}

    def __iter__(self) -> Iterator[Attention]:
        """All of them, in the graph's order."""
        return iter(self._found.values())

    def of(self, x: torch.fx.Node) -> Attention | str:
        """The attention for layers that read ``x``; or why there is none."""
        if not self._found:
            return "the graph has no attention"
        if len(sizes(x)) < 2:
            return f"{x.name} has no axis of tokens"
        for attention in self._feeds.get(x, ()):
            if attention.fits(x):
                return attention
        for node, axis in self._upstream([(x, len(sizes(x)) - 2)]):
            attention = self._found.get(node)
            if attention is None or axis != len(sizes(node)) - 2:
                continue
            if attention.fits(x) and self._is_self(attention):
                return attention
        return f"no attention has the tokens of {x.name} as its keys"

    def _direct_sources(self, starts: Sequence[Axis]) -> set[torch.fx.Node]:
        """What the nearest linear operators before ``starts`` read."""
        found = set[torch.fx.Node]()
        for node, _ in self._upstream(starts, through_linears=False):
            if _is_linear(node):
                found.add(_linear_input(node))
        return found

    def _is_self(self, attention: Attention) -> bool:
        """Whether queries and keys come from one value, token by token."""
        node = attention.node
        if node not in self._selfish:
            mine = {found for found in self._upstream([attention.queries]) if _is_source(found[0])}
            self._selfish[node] = any(
                found in mine for found in self._upstream(attention.keys[:1]))
        return self._selfish[node]

    def _upstream(self, starts: Sequence[Axis], through_linears: bool = True) -> Iterator[Axis]:
        """Values whose axis becomes that of ``starts``, the latest in the graph first."""
        seen = set(starts)
        pending = [(-self._order[node], axis, node) for node, axis in starts]
        heapq.heapify(pending)
        while pending:
            _, axis, node = heapq.heappop(pending)
            yield node, axis
            if not through_linears and _is_linear(node):
                continue
            for before in _before(node, axis):
                if before not in seen:
                    seen.add(before)
                    heapq.heappush(pending, (-self._order[before[0]], before[1], before[0]))


def _is_attention(node: torch.fx.Node) -> bool:
    return node.target is _FUSED or (
        node.meta.get(ATTENTION) == _VALUES and len(sizes(node)) >= 2
        and node.target in (aten.matmul.default, aten.bmm.default))  # fmt: skip


def _is_linear(node: torch.fx.Node) -> bool:
    contraction = contraction_of(node)
    return contraction is not None and contraction.kind == "linear"


def _linear_input(node: torch.fx.Node) -> torch.fx.Node:
    source: Any = node.args[0]
    return source


def _is_source(node: torch.fx.Node) -> bool:
    """Whether a linear reads it, or a table made it: what positions are made of is neither."""
    contraction = contraction_of(node)
    return (contraction is not None and contraction.kind == "embedding") or any(
        _is_linear(user) and user.args[0] is node for user in node.users)


def _before(node: torch.fx.Node, axis: int) -> list[Axis]:
    """The axes of what ``node`` reads that axis ``axis`` of its value is."""
    if node.op != "call_function" or not node.all_input_nodes:
        return []
    if node.target is operator.getitem:
        return [(node.all_input_nodes[0], axis)]
    rank = len(sizes(node))
    contraction = contraction_of(node)
    if contraction is not None and contraction.kind == "matmul" and axis == rank - 1:
        right: Any = node.args[contraction.operands[1].argument]
        return [(right, len(sizes(right)) - 1)]
    if node.target in _ALONG:
        return _through_cut(node, axis)
    rule = rule_for(node.target)
    elementwise = rule is not None and rule.axes is axes.identity
    if elementwise or node.target is aten.where.self:
        return _aligned(node, axis, rank)
    if rule is None or rule.axes is None:
        return []
    source: Any = node.args[0]
    before = rule.axes(node)[axis]
    return [] if before is None else [(source, before)]


def _aligned(node: torch.fx.Node, axis: int, rank: int) -> list[Axis]:
    """Of an elementwise operator: every operand that is not broadcast along the axis."""
    shape = sizes(node)
    found: list[Axis] = []
    for operand in node.all_input_nodes:
        size = sizes(operand)
        place = axis - (rank - len(size))
        if place >= 0 and axes.same_size(size[place], shape[axis]):
            found.append((operand, place))
    return found


def _through_cut(node: torch.fx.Node, axis: int) -> list[Axis]:
    """Of an operator along one dimension: every other axis stays."""
    sources = [source for source in node.all_input_nodes if sizes(source)]
    if not sources:
        return []
    rank = len(sizes(sources[0]))
    along = int(argument(node, _ALONG[node.target], "dim", 0)) % rank
    if node.target in _PICKS:
        axis += axis >= along
    elif axis == along:
        return []
    return [(source, axis) for source in sources if len(sizes(source)) == rank]
