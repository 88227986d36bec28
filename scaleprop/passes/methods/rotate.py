"""Rotation: outliers of few channels are spread over all, by orthogonal matrices.

    residual stream   x → x·Q: norms without gains let it pass, what writes and reads absorbs it
    values            each head's values v → v·Q up to the projection that reads all heads
    keys              queries and keys, where they are multiplied: q·H·(k·H)ᵀ; at run time where a
                      rotary embedding stands before it, which a rotation does not pass
    elsewhere         x → x·H right before a quantized operator, Hᵀ in its weight: at run time

Q = diag(s)·H/√n with random signs s (S. Ashkboos et al., QuaRot, arXiv:2404.00456; SpinQuant,
arXiv:2405.16406, calls the four R1, R2, R3 and R4), or uniform on the orthogonal group. Where n is
no size of a Hadamard matrix, what parameters absorb is mixed by the Kronecker product with a
Hartley matrix of the rest; at run time blocks of the largest size that divides n are.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from scaleprop.errors import ConfigError
from scaleprop.ops.hadamard import hadamard_sizes
from scaleprop.passes.canonicalise.attention import products_around
from scaleprop.passes.transforms.base import Site, TransformPass, Work
from scaleprop.passes.transforms.region import Region, find_region
from scaleprop.passes.transforms.transform import (
    Rotate,
    full_rotation,
    hadamard_rotation,
    random_rotation,
)
from scaleprop.rules import contraction_of

aten: Any = torch.ops.aten

Node = torch.fx.Node

_NORMS = (aten.rms_norm.default, aten.layer_norm.default)


@dataclasses.dataclass(frozen=True)
class RotateChannels(TransformPass):
    """Rotate residual streams, attention's values, and what else quantized operators read.

    residual, values, online: which of the three; the last needs ``runtime``.
    keys: rotate queries and keys too. Their product stays in high precision, so this only helps
        what stores keys in few bits.
    matrix: ``hadamard`` with random signs, or ``random`` (uniform; not for what runs).
    block: at run time rotate blocks of at most so many channels, which bounds the cost; None: as
        large as there are.
    cuts: how many operators at run time a residual stream's rotation may cost (its inputs, and
        what the model returns). seed: of signs and matrices.
    Run fold-norms first: gains and means stop a rotation.
    """

    residual: bool = True
    values: bool = True
    online: bool = True
    keys: bool = False
    matrix: Literal["hadamard", "random"] = "hadamard"
    cuts: int = 2
    seed: int = 0
    block: int | None = None

    name: ClassVar[str] = "rotate"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a negative number of cuts, or blocks of no channels."""
        if self.cuts < 0:
            raise ConfigError(f"cuts={self.cuts} is a number of operators, at least 0")

        if self.block is not None and self.block < 1:
            raise ConfigError(f"block={self.block} is a number of channels, at least 1")

    def transform(self, work: Work) -> None:
        """Streams first, then values, then what is left."""
        generator = torch.Generator().manual_seed(self.seed)
        sites = work.sites()
        done: set[str] = set()
        if self.residual:
            for seed in _streams(work):
                self._free(work, seed, sites, done, generator, self.cuts)
        if self.values:
            for seed in _attended(work):
                self._free(work, seed, sites, done, generator, 0)
        if self.keys:
            for queries, keys in _scores(work):
                self._keys(work, queries, keys, generator)
        if self.online and self.runtime:
            for site in sites:
                if site.value.name not in done and site.axis == -1:
                    region = find_region(site.value, "rotate", only_users=site.readers)
                    work.apply(region, self.rotation(work, region, [site], generator, True),
                               "rotated")

    def _free(
        self, work: Work, seed: Node, sites: list[Site], done: set[str],
        generator: torch.Generator, cuts: int,
    ) -> None:  # fmt: skip
        if seed.name in done:
            return
        region = find_region(seed, "rotate")
        done.update(value.name for value in region.members)
        if region.runtime > cuts:
            work.refuse(seed, "rotate", f"{region.runtime} operators would be left at run time: "
                        + "; ".join(str(cut) for cut in region.cuts[:3]))
            done.difference_update(value.name for value in region.members)
            return
        served = [site for site in sites if reads_weight(region, site)]
        if not served:
            return  # nothing that is quantized would profit
        work.apply(region, self.rotation(work, region, served, generator), "rotated")

    def _keys(self, work: Work, queries: Node, keys: Node, generator: torch.Generator) -> None:
        region = find_region(queries, "rotate")
        if not region.is_free:
            region = find_region(queries, "rotate", stops=(queries, keys))
        if region.runtime > (2 if self.runtime else 0):
            work.refuse(queries, "rotate", f"{region.runtime} operators would be left at run time: "
                        + "; ".join(str(cut) for cut in region.cuts[:3]))
            return
        matrix = self.rotation(work, region, [], generator, not region.is_free)
        work.apply(region, matrix, "queries and keys rotated")

    def rotation(
        self, work: Work, region: Region, sites: list[Site], generator: torch.Generator,
        online: bool = False,
    ) -> Rotate:  # fmt: skip
        """The matrix of a region whose rotation ``sites`` profit from. online: it is all that is
        left to run, once for each of them."""
        if online:
            limit = region.block if self.block is None else min(self.block, region.block)
            block = max(n for n in hadamard_sizes(limit) if region.block % n == 0)
            return hadamard_rotation(region.block, generator, block)
        if self.matrix == "random":
            return random_rotation(region.block, generator)
        return full_rotation(region.block, generator)


def reads_weight(region: Region, site: Site) -> bool:
    """Whether a site's value carries the region's transform."""
    return region.layout(site.value) is not None


def _streams(work: Work) -> list[Node]:
    """What norms read."""
    found = [node.args[0] for node in work.rewriter.graph.nodes
             if node.target in _NORMS and len(node.args[1]) == 1]  # fmt: skip
    return [node for node in dict.fromkeys(found) if isinstance(node, Node)]


def _scores(work: Work) -> list[tuple[Node, Node]]:
    """The queries and keys that attention multiplies."""
    found: dict[Node, tuple[Any, Any]] = {}
    for node in work.rewriter.graph.nodes:
        contraction = contraction_of(node)
        if contraction is not None and contraction.kind == "attention":
            found[node] = node.args[0], node.args[1]
        elif (products := products_around(node)) is not None:
            first = int(products[0].target is aten.baddbmm.default)
            found[products[0]] = products[0].args[first], products[0].args[first + 1]
    return [(queries, keys) for queries, keys in found.values()
            if isinstance(queries.meta["val"].shape[-1], int)]  # fmt: skip


def _attended(work: Work) -> list[Node]:
    """What attention returns: rows of values, weighted."""
    found: list[Node] = []
    for node in work.rewriter.graph.nodes:
        contraction = contraction_of(node)
        weighs = contraction is not None and contraction.kind == "matmul" and (
            work.rewriter.constant_value(node.args[1]) is None)  # fmt: skip
        attends = weighs or (contraction is not None and contraction.kind == "attention")
        if attends and isinstance(node.meta["val"].shape[-1], int):
            found.append(node)
    return found
