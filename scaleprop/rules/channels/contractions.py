"""Contractions: one side of what is summed over carries a transform, the other its inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.fx

from scaleprop.rules.channels.base import (
    DIAGONAL,
    GROUPED,
    INVERTIBLE,
    LINEAR,
    MONOMIAL,
    Flow,
    apart,
    channels,
    only,
)
from scaleprop.rules.channels.layouts import Layout, Refused, sizes_of

aten: Any = torch.ops.aten

_SUMMED = "what is summed over has no inverse here"


def _argument(node: torch.fx.Node, place: int) -> Any:
    return node.args[place] if len(node.args) > place else None


@channels(aten.linear.default)
def linear(flow: Flow) -> None:
    """y[…, n] = Σ_k x[…, k]·w[n, k] + b[n]."""
    x, w, bias = (_argument(flow.node, place) for place in range(3))
    last = len(sizes_of(x)) - 1
    if len(sizes_of(w)) != 2:
        raise Refused("its weight is a vector")
    if (layout := flow.of(x)) is not None:
        if layout.axes != (last,):
            raise Refused("channels lie along its rows")
        _weigh(flow, layout, w, 1, 1)
    if (back := flow.of(w)) is not None:  # a weight that is computed
        _of_weight(flow, back, x, last, bias)
    if flow.out is not None:
        if flow.out.axes != (last,):
            raise Refused("channels lie along its rows")
        if flow.kind != "shift":
            flow.carry(w, flow.out.at([0]), 1)
        if bias is not None or flow.kind == "shift":
            flow.carry(bias, flow.out.at([0]), 2, missing=0.0)


def _weigh(flow: Flow, layout: Layout, w: Any, axis: int, slot: int) -> None:
    """The weight ``w`` carries the inverse of what comes in, along its ``axis``."""
    if flow.kind == "shift":
        flow.counter(layout)
        return
    only(flow, INVERTIBLE, _SUMMED)
    flow.carry(w, layout.inverse().at([axis]), slot, side=1)


def _of_weight(flow: Flow, layout: Layout, x: Any, last: int, bias: Any) -> None:
    if flow.kind == "shift":
        raise Refused("its weight is shifted")
    if layout.axes == (1,):
        only(flow, INVERTIBLE, _SUMMED)
        flow.carry(x, layout.inverse().at([last]), 0)
    elif layout.axes == (0,):
        flow.result(layout.at([last]))
        if bias is not None:
            flow.carry(bias, layout, 2)
    else:
        raise Refused("its weight carries channels along both axes")


@channels(aten.embedding.default)
def embedding(flow: Flow) -> None:
    """y[…, d] = w[ids[…], d]."""
    if (layout := flow.of(flow.node.args[0])) is not None:
        raise Refused(f"its table is computed, with channels along axes {layout.axes}")
    if flow.out is not None:
        if flow.out.axes != (len(sizes_of(flow.node)) - 1,):
            raise Refused("channels lie along its rows")
        flow.carry(flow.node.args[0], flow.out.at([1]), 0)


@channels(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(flow: Flow) -> None:
    """y[n, o, …] = Σ x[n, i, …]·w[o, i, taps] + b[o], in groups."""
    x, w, bias = (_argument(flow.node, place) for place in range(3))
    groups: Any = _argument(flow.node, 6) or 1
    padding: Any = _argument(flow.node, 4) or [0]
    layout = flow.of(x)
    if flow.of(w) is not None and not flow.is_parameter(w) and flow.kind == "shift":
        raise Refused("its weight is shifted")
    for known in (layout, flow.out):
        if known is not None and (known.axes != (1,) or len(sizes_of(x)) != len(sizes_of(w))):
            raise Refused("channels lie along its pixels, or it has no batch")
    if layout is not None:
        if flow.kind == "shift" and (groups != 1 or any(pad != 0 for pad in padding)):
            raise Refused("its padding, or its groups, do not let a shift pass")
        if groups == 1:
            _weigh(flow, layout, w, 1, 1)
        else:
            _weigh_groups(flow, layout, w, bias, groups)
    if flow.out is None:
        return
    if flow.kind == "shift":
        flow.carry(bias, flow.out.at([0]), 2, missing=0.0)
        return
    only(flow, LINEAR if groups == 1 else MONOMIAL, "its groups do not mix")
    if groups > 1 and flow.kind == "permute":
        _permute_depthwise(flow, flow.out, w, bias, groups)
        return
    flow.carry(w, flow.out.at([0]), 1)
    if bias is not None:
        flow.carry(bias, flow.out.at([0]), 2)


def _weigh_groups(flow: Flow, layout: Layout, w: Any, bias: Any, groups: int) -> None:
    """Output o of a group reads the group's inputs: w[o, i] carries the inverse of that input."""
    if flow.kind == "permute":
        _permute_depthwise(flow, layout, w, bias, groups)
        return
    only(flow, DIAGONAL, "its groups do not mix")
    outputs, inputs = sizes_of(w)[:2]
    group = np.arange(outputs) // (outputs // groups)
    source = group[:, None] * inputs + np.arange(inputs)[None, :]
    inverse = layout.inverse()
    flow.carry(w, Layout((0, 1), inverse.codes[source]), 1, side=1)


def _permute_depthwise(flow: Flow, layout: Layout, w: Any, bias: Any, groups: int) -> None:
    """One channel a group: what comes in permuted goes out permuted."""
    if groups != layout.codes.shape[0] or sizes_of(w)[0] != groups:
        raise Refused("its groups hold several channels")
    flow.carry(flow.node.args[0], layout, 0)
    flow.result(layout)
    flow.carry(w, layout.at([0]), 1)
    if bias is not None:
        flow.carry(bias, layout.at([0]), 2)


@channels(aten.matmul.default, aten.mm.default, aten.bmm.default)
def product(flow: Flow) -> None:
    """y[…, m, n] = Σ_k a[…, m, k]·b[…, k, n]."""
    _product(flow, 0, 1)


@channels(aten.addmm.default, aten.baddbmm.default)
def sum_and_product(flow: Flow) -> None:
    """y = c + a·b."""
    if any(flow.node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise Refused("its terms are scaled")
    only(flow, LINEAR, "a shift of a product is not followed")
    _product(flow, 1, 2)
    out = flow.out
    c: Any = flow.node.args[0]
    if (layout := flow.of(c)) is not None:
        raise Refused(f"what is added carries channels along {layout.axes}")
    if out is not None:
        lead = len(sizes_of(flow.node)) - len(sizes_of(c))
        if any(axis < lead for axis in out.axes):
            raise Refused("what is added is the same for all channels")
        flow.carry(c, out.at([axis - lead for axis in out.axes]), 0)


def _product(flow: Flow, first: int, second: int) -> None:
    a, b = flow.node.args[first], flow.node.args[second]
    ranks = len(sizes_of(a)), len(sizes_of(b))
    rank = len(sizes_of(flow.node))
    if ranks[0] != rank or ranks[1] not in (2, rank) or rank < 2:
        raise Refused("its operands differ in their numbers of axes")
    matrix = ranks[1] == 2 < rank
    _operand(flow, a, rank - 1, rank - 2,
             lambda known: _across(flow, known, b, second, rank, matrix))
    _operand(flow, b, ranks[1] - 2, ranks[1] - 1,
             lambda known: _across_back(flow, known, a, first, rank, ranks[1]))  # fmt: skip
    if (out := flow.out) is not None:
        if rank - 2 in out.axes and rank - 1 in out.axes:
            raise Refused("channels lie along both of its axes")
        apart(flow, out, range(rank - 2), "each matrix is multiplied for itself")
        if rank - 1 in out.axes:
            if flow.kind == "shift":
                _need_unit_rows(a)
            if matrix and out.axes != (rank - 1,):
                raise Refused("its matrix is the same for all channels")
            flow.carry(b, out.at([axis - rank + ranks[1] for axis in out.axes]), second)
        elif rank - 2 in out.axes:
            only(flow, LINEAR, "a shift of rows is not followed")
            flow.carry(a, out, first)
        else:
            raise Refused("channels lie along its batch only")


def _operand(flow: Flow, value: Any, summed: int, free: int, across: Any) -> None:
    layout = flow.of(value)
    if layout is None:
        return
    if summed in layout.axes and free in layout.axes:
        raise Refused("channels lie along both axes of an operand")
    apart(flow, layout, range(len(sizes_of(value)) - 2), "each matrix is multiplied for itself")
    if summed in layout.axes:
        only(flow, INVERTIBLE, _SUMMED)
        across(layout)
    elif free in layout.axes:
        rank = len(sizes_of(flow.node))
        if flow.kind == "shift":
            if free < summed:
                raise Refused("a shift of rows is not followed")
            _need_unit_rows(flow.node.args[0])
        shift = rank - len(sizes_of(value))
        flow.result(layout.at([axis + shift for axis in layout.axes]))
    else:
        raise Refused("channels lie along its batch only")


def _across(flow: Flow, layout: Layout, b: Any, slot: int, rank: int, matrix: bool) -> None:
    """What a carries along its last axis, b carries inverted along its last but one."""
    if matrix and layout.axes != (rank - 1,):
        raise Refused("its matrix is the same for all channels")
    shift = rank - 2 if matrix else 0
    axes = [axis - 1 if axis == rank - 1 else axis for axis in layout.axes]
    flow.carry(b, layout.inverse().at([axis - shift for axis in axes]), slot)


def _across_back(
    flow: Flow, layout: Layout, a: Any, slot: int, rank: int, rank_b: int
) -> None:
    shift = rank - rank_b
    axes = [rank - 1 if axis == rank_b - 2 else axis + shift for axis in layout.axes]
    flow.carry(a, layout.inverse().at(axes), slot)


def _need_unit_rows(a: Any) -> None:
    """Rows that sum to 1 let a shift of what they weigh pass: those of a softmax."""
    node = a
    while isinstance(node, torch.fx.Node) and node.target in _MOVES:
        node = node.args[0]
    if not (isinstance(node, torch.fx.Node) and node.target in _SOFTMAX
            and node.args[1] in (-1, len(sizes_of(node)) - 1)):  # fmt: skip
        raise Refused("rows do not sum to 1, so a shift does not pass")


_MOVES = (aten.clone.default, aten.expand.default, aten._to_copy.default, aten.alias.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


@channels(aten.scaled_dot_product_attention.default)
def attention(flow: Flow) -> None:
    """y = softmax(q·kᵀ·scale + mask)·v: q against k, and v passes to y."""
    q, k, v = flow.node.args[:3]
    rank = len(sizes_of(flow.node))
    last = rank - 1
    queries, keys = sizes_of(q), sizes_of(k)
    if any(flow.of(other) is not None for other in flow.node.all_input_nodes
           if other not in (q, k, v)):  # fmt: skip
        raise Refused("its mask carries channels")
    for value, other, slot in ((q, k, 1), (k, q, 0)):
        layout = flow.of(value)
        if layout is None:
            continue
        if flow.kind == "shift" and value is k:
            _inside(flow, layout, last)
            continue  # it adds the same to all scores of a query, which softmax ignores
        only(flow, INVERTIBLE, _SUMMED)
        _inside(flow, layout, last)
        _shared_heads(layout, queries, keys, last)
        flow.carry(other, layout.inverse(), slot)
    if (layout := flow.of(v)) is not None:
        _inside(flow, layout, last)
        _shared_heads(layout, queries, sizes_of(v), last)
        flow.result(layout)
    if flow.out is not None:
        _inside(flow, flow.out, last)
        _shared_heads(flow.out, queries, sizes_of(v), last)
        flow.carry(v, flow.out, 2)


def _inside(flow: Flow, layout: Layout, last: int) -> None:
    if last not in layout.axes or last - 1 in layout.axes:
        raise Refused("channels lie along tokens, or along heads only")
    apart(flow, layout, range(last), "each head attends for itself")


def _shared_heads(layout: Layout, queries: Any, keys: Any, last: int) -> None:
    """With fewer heads of keys than of queries (enable_gqa) layouts cannot be handed over as is."""
    others = [axis for axis in layout.axes if axis != last]
    if any(queries[axis] != keys[axis] for axis in others):
        raise Refused("heads of keys and values serve several heads of queries inside the operator")


@channels(GROUPED)
def grouped_product(flow: Flow) -> None:
    """y[r, n] = Σ_k x[r, k]·w[group(r), k, n]."""
    x, w = flow.node.args[:2]
    only(flow, LINEAR, "a shift of a product of groups is not followed")
    if (layout := flow.of(x)) is not None:
        only(flow, INVERTIBLE, _SUMMED)
        if layout.axes != (1,):
            raise Refused("channels lie along its rows")
        flow.carry(w, layout.inverse(), 1)
    if (layout := flow.of(w)) is not None:
        if layout.axes == (1,):
            only(flow, INVERTIBLE, _SUMMED)
            flow.carry(x, layout.inverse(), 0)
        elif layout.axes == (2,):
            flow.result(layout.at([1]))
        else:
            raise Refused("its weights carry channels of their own each")
    if flow.out is not None:
        if flow.out.axes != (1,):
            raise Refused("channels lie along its rows")
        flow.carry(w, flow.out.at([2]), 1)
