"""Attention's heads: regions inside them, and the projections that their values come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.fx
from torch import Tensor

from scaleprop.passes.transforms.base import Work
from scaleprop.passes.transforms.region import Region, find_region
from scaleprop.rules import contraction_of
from scaleprop.rules.channels import Kind, sizes_of

Node = torch.fx.Node


def attending(work: Work) -> list[Node]:
    """Attention in one operator, in graph order: (q, k, v, …) → rows of values, weighted."""
    found = [(node, contraction_of(node)) for node in work.rewriter.graph.nodes]
    return [node for node, contraction in found
            if contraction is not None and contraction.kind == "attention"]  # fmt: skip


def head_regions(
    value: Node, kind: Kind, *, blocks: Sequence[int] = (1,), shared: bool = False
) -> Iterator[Region]:
    """Regions of the channels inside heads: each head for itself, then one for all of them.

    value: [batch, heads, tokens, channels]. blocks: of kinds that mix, into how many parts of the
    same size a head is taken. shared: all heads alike, nothing else.
    """
    shape, size = value.meta["val"].shape, sizes_of(value)[-1]
    for axes in ((-1,),) if shared else ((-3, -1), (-1,)):
        fixed = len(shape) >= -axes[0] and all(isinstance(shape[axis], int) for axis in axes)
        for parts in blocks if fixed else ():
            if size % parts == 0 and size > parts:
                yield find_region(value, kind, axes=axes, block=size // parts)


def projections(work: Work, region: Region, value: Node) -> list[Node]:
    """The linears with constant weights that ``value`` comes from, all inside the region."""
    found: list[Node] = []
    pending, seen = [value], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or node not in region.members:
            continue
        seen.add(node)
        contraction = contraction_of(node)
        if contraction is None or contraction.kind != "linear":
            pending += node.all_input_nodes
        elif work.rewriter.constant_value(node.args[1]) is not None:
            found.append(node)
    return found


def largest(region: Region, values: Mapping[Node, Tensor]) -> Tensor:
    """[size of the region] float64: of numbers ≥ 0 per channel of its values, the largest of each
    of its channels; 0 for channels of none."""
    found = torch.zeros(region.size, dtype=torch.float64)
    for node, numbers in values.items():
        codes = torch.from_numpy(region.members[node].codes).reshape(-1)
        found.scatter_reduce_(0, codes[codes >= 0] >> 1, numbers.double()[codes >= 0], "amax")
    return region.pooled(found)
