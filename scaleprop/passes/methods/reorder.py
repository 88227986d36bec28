"""Reordering: channels of like magnitude come to share a block, and outliers spoil fewer others.

A block's scale is its largest element's, and every element's error is in proportion to it. The sum
of the blocks' largest is least where channels are sorted. A permutation P is free where parameters
take it up, at compile time:

    residual stream   what writes it permutes its outputs, what reads it its inputs; norms follow
    values            inside each head, up to the projection that reads all heads
    hidden channels   gate and up permute their outputs, down its inputs
    keys              inside each head, as the queries; rotary embeddings permute their frequencies

(N. Trukhanov and I. Soloveychik, Accurate Block Quantization in LLMs with Outliers,
arXiv:2403.20137, K-sort: keys sorted by the norms of their projection's rows.) Both operands of
a product are in blocks along what is summed, and one order has to serve both: channels are sorted
by what activations reach, by what weights reach, by the product, and by the activations' mean
magnitude; the readers' output error chooses, and may keep the order as it is. Keys are sorted by
the paper's norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats import parse
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.heads import attending, head_regions, largest, projections
from scaleprop.passes.transforms.region import Region, find_region
from scaleprop.passes.transforms.search import OutputError
from scaleprop.passes.transforms.transform import Permute
from scaleprop.rules.channels import Kind, block_rows

Node = torch.fx.Node

_KIND: Kind = "permute"


@dataclasses.dataclass(frozen=True)
class Reorder(TransformPass):
    """Sort channels by magnitude where block formats read them, at compile time.

    keys: sort the keys of attention too, for a cache of them in a block format.
    cuts: how many orders at run time a region may cost (inputs, and what the model returns).
    """

    runtime: bool = False
    keys: bool = False
    cuts: int = 0

    name: ClassVar[str] = "reorder"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a negative number of cuts."""
        if self.cuts < 0:
            raise ConfigError(f"cuts={self.cuts} is a number of operators, at least 0")

    def transform(self, work: Work) -> None:
        """Inside heads first, then what is left, in graph order."""
        sites = [site for site in work.sites() if _in_blocks(work, site)]
        done: set[str] = set()
        for seed, region in self._regions(work, sites, done):
            reads = work.covered(region, sites)
            done.update(value.name for value in region.members)
            if reads:
                self._sort(work, region, reads)
            else:
                work.refuse(seed, _KIND, "no reader of a block format has all of its channels")
        for node in attending(work) if self.keys else ():
            self._sort_keys(work, node)

    def _regions(
        self, work: Work, sites: Sequence[Site], done: set[str]
    ) -> Iterator[tuple[Node, Region]]:
        values = {site.value for site in sites}
        for node in attending(work):
            for region in head_regions(node, _KIND, blocks=(1,)):
                if region.runtime <= self.cuts and values & region.members.keys():
                    yield node, region
                    break
        for site in sites:
            if site.value.name in done:
                continue
            region = find_region(site.value, _KIND)
            if region.runtime <= self.cuts:
                yield site.value, region
            elif self.runtime:
                yield site.value, find_region(site.value, _KIND, only_users=site.readers)
            else:
                work.refuse(site.value, _KIND, "; ".join(str(cut) for cut in region.cuts[:3]))

    def _sort(self, work: Work, region: Region, sites: Sequence[Site]) -> None:
        errors = [(OutputError(work, site), region.members[site.value]) for site in sites]
        least = sum(error() for error, _ in errors)
        best: Permute | None = None
        for score in _scores(work, region, sites):
            order = Permute(_sorted(score, region))
            found = sum(error(order=_places(order, region, layout)) for error, layout in errors)
            if found < least:
                least, best = found, order
        if best is None:
            work.refuse(region.seed, _KIND, "no order gives a smaller error")
        else:
            work.apply(region, best, "sorted")

    def _sort_keys(self, work: Work, node: Node) -> None:
        """The largest rows of the keys' projection first."""
        keys: Any = node.args[1]
        # between rotary embeddings each half of a head moves for itself
        for region in head_regions(keys, _KIND, blocks=(1, 2)):
            if region.is_free:
                score = _row_norms(work, region, keys)
                if score is not None:
                    work.apply(region, Permute(_sorted(score, region)), "keys sorted")
                return
        work.refuse(keys, _KIND, "no order of its channels inside heads is free")


def _in_blocks(work: Work, site: Site) -> bool:
    """Whether several blocks of channels have scales of their own, for some operand."""
    if site.axis != -1:
        return False
    for reader in site.readers:
        assignment = work.assignment(reader)
        roles = (assignment.activation, assignment.weight) if assignment else ()
        formats = [parse(role.format) for role in roles if role is not None]
        if any(fmt.block is not None and fmt.block[1] < site.size for fmt in formats):
            return True
    return False


def _scores(work: Work, region: Region, sites: Sequence[Site]) -> Iterator[Tensor]:
    """Magnitudes per channel of the region; those of a site in units of their mean."""
    inputs = {site: work.amax(site).double() for site in sites}
    weights = {site: work.weight_amax(site) for site in sites}
    means = {site: work.statistics(site).channel_mean_abs for site in sites}
    products = {site: inputs[site] * weights[site] for site in sites}
    for found in (inputs, weights, products, means):
        units = {site: value / value.mean().clamp_min(torch.finfo(torch.float32).tiny)
                 for site, value in found.items() if value is not None}  # fmt: skip
        yield work.pooled(region, units).nan_to_num(0.0)


def _sorted(score: Tensor, region: Region) -> Tensor:
    """[blocks, n]: the largest first; channels that are one are sorted alike."""
    pooled = region.pooled(score)
    return pooled.reshape(-1, region.block).argsort(dim=1, descending=True, stable=True)


def _places(order: Permute, region: Region, layout: Any) -> Tensor:
    """[K]: which of a value's channels comes where."""
    rows = torch.from_numpy(block_rows(layout, region.block))
    blocks = torch.from_numpy(layout.codes.reshape(-1))[rows[:, 0]] // (2 * region.block)
    places = torch.arange(layout.codes.size)
    places[rows] = rows.gather(1, order.order[blocks])
    return places


def _row_norms(work: Work, region: Region, keys: Node) -> Tensor | None:
    """[size of the region]: of the rows of the projections that ``keys`` come from."""
    rows = {node: work.weight(node).norm(dim=1) for node in projections(work, region, keys)}
    return largest(region, rows) if rows else None
