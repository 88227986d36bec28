"""What a transform would cost: the error of what reads a value, in the formats that it will have.

With y = T(x) and v = w·T⁻ᵀ, both in float32, over the rows that calibration kept:

    error = Σ ‖y·vᵀ − Q(y)·Q(v)ᵀ‖² / Σ ‖x·wᵀ‖²      summed over the readers of the value

A shift z leaves W·z to the bias, which is not quantized, so it takes no part in the difference. Of
a convolution, rows are single pixels: every tap counts for itself, as if its neighbours' errors
were independent of its own. Compensated and solved weights count as rounded to nearest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import CalibrationError, PassError, describe
from scaleprop.formats import ScaledFormat, fake_quantize, parse, quantize
from scaleprop.passes.transforms.base import Site, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.recipes.base import Role


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """weight: [groups, outputs, taps, inputs] float32. product: [n, groups, outputs, taps].
    activation, format: of its operands; None: not quantized."""

    weight: Tensor
    product: Tensor
    activation: Role | None
    format: ScaledFormat | None


class OutputError:
    """The error of a site's readers after a candidate: what does not depend on it is kept.

    activation, weight: roles for all readers instead of those assigned to them.
    """

    def __init__(
        self, work: Work, site: Site, *, activation: Role | None = None,
        weight: Role | None = None,
    ) -> None:  # fmt: skip
        """Raises ``CalibrationError`` where calibration kept no rows of the site's value."""
        statistics = work.statistics(site)
        if statistics.sample is None or len(statistics.sample) == 0:
            raise CalibrationError(
                f"{describe(site.value)}: calibration kept no rows of it. Remedy: a method that "
                "measures errors asks for them, needs = Needs(sample=…)"
            )
        self.rows = statistics.sample
        self._range = statistics.channel_min, statistics.channel_max
        self._readers = [
            reader for node in site.readers
            if (reader := _reader(work, node, self.rows, activation, weight)) is not None
        ]  # fmt: skip
        self.signal = sum(float(item.product.double().square().sum()) for item in self._readers)

    def __call__(
        self,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        rotation: Tensor | None = None,
        order: Tensor | None = None,
        extremes: tuple[float, float] | None = None,
    ) -> float:
        """The relative error with y = (((x − shift)·scale)·rotation)[order].

        scale, shift: [K], as ``Scale`` and ``Shift`` have them. rotation: [n, n] orthogonal, for
        each block of n channels, or [K/n, n, n]. order: [K], of all channels.
        extremes: of y, that a scale of the whole tensor is made for; None: those that it had.
        """
        rows, bounds = self.rows, self.bounds(scale, shift, rotation)
        bounds = bounds if extremes is None else torch.tensor(extremes)
        rows = rows if shift is None else rows - shift.float()
        rows = rows if scale is None else rows * scale.float()
        rows = rows if rotation is None else _rotated(rows, rotation)
        rows = rows if order is None else rows[:, order]
        rounded: dict[Role, Tensor] = {}
        noise = 0.0
        for reader in self._readers:
            weight = _transformed(reader.weight, scale, rotation, order)
            exact = reader.product if shift is None else _product(rows, weight)
            x = rows
            if (role := reader.activation) is not None:
                if role not in rounded:
                    rounded[role] = _rounded_rows(rows, role, bounds)
                x = rounded[role]
            got = _product(x, _rounded_weight(weight, reader.format))
            noise += float((got - exact).double().square().sum())
        return noise / self.signal if self.signal else noise

    def bounds(
        self, scale: Tensor | None = None, shift: Tensor | None = None,
        rotation: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """[2] float32: between what the transformed values were, over all rows; None: unknown."""
        low, high = self._range
        if low is None or high is None or rotation is not None:
            return None
        ends = torch.stack([low, high]).double()
        ends = ends if shift is None else ends - shift
        ends = ends if scale is None else ends * scale
        return torch.stack([ends.min(), ends.max()]).float()


class RegionError:
    """The mean relative error of the sites of a region, for transforms of the region's channels."""

    def __init__(self, work: Work, region: Region, sites: Sequence[Site]) -> None:
        """sites: those that the region covers; raises as ``OutputError``."""
        self._parts = [(OutputError(work, site), _codes(region, site)) for site in sites]

    def __call__(self, *, scale: Tensor | None = None, shift: Tensor | None = None) -> float:
        """scale, shift: [size of the region]."""
        errors = [
            error(scale=None if scale is None else _site_scale(scale, codes),
                  shift=None if shift is None else torch.where(
                      codes < 0, 0.0, shift[codes.clamp_min(0) >> 1]))
            for error, codes in self._parts
        ]  # fmt: skip
        return sum(errors) / len(errors) if errors else 0.0


def output_error(
    work: Work, site: Site, *, scale: Tensor | None = None, rotation: Tensor | None = None,
    shift: Tensor | None = None,
) -> float:  # fmt: skip
    """``OutputError`` of one candidate: arguments, errors raised as there."""
    return OutputError(work, site)(scale=scale, shift=shift, rotation=rotation)


def site_scale(scale: Tensor, region: Region, site: Site) -> Tensor:
    """[K]: what factors of a region's channels are for a site's."""
    return _site_scale(scale, _codes(region, site))


def _codes(region: Region, site: Site) -> Tensor:
    return torch.from_numpy(region.members[site.value].codes).reshape(-1)


def _site_scale(scale: Tensor, codes: Tensor) -> Tensor:
    found = scale[codes.clamp_min(0) >> 1]
    return torch.where(codes < 0, 1.0, torch.where(codes % 2 == 1, 1 / found, found))


def _reader(
    work: Work, node: torch.fx.Node, rows: Tensor, activation: Role | None, weight: Role | None
) -> _Reader | None:
    assignment = work.assignment(node)
    if assignment is not None:
        activation = activation or assignment.activation
        weight = weight or assignment.weight
    if activation is None and weight is None:
        return None
    given = work.weight(node).float()
    inputs = given.shape[1]
    groups = rows.shape[1] // inputs
    folded = given.flatten(2) if given.ndim > 2 else given.unsqueeze(-1)  # [O, I, taps]
    folded = folded.reshape(groups, -1, inputs, folded.shape[-1]).mT.contiguous()
    fmt = None if weight is None else parse(weight.format)
    if fmt is not None and weight is not None and weight.clipping == "mse":
        fmt = fmt.replace(rule="mse")
    return _Reader(folded, _product(rows, folded), activation, fmt)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """[n, groups, outputs, taps]: each group's channels with its own weights."""
    if weight.shape[0] == 1:
        return (rows @ weight[0].flatten(0, 1).mT).reshape(len(rows), *weight.shape[:3])
    grouped = rows.reshape(len(rows), weight.shape[0], -1)
    return torch.einsum("ngi,goti->ngot", grouped, weight)


def _transformed(
    weight: Tensor, scale: Tensor | None, rotation: Tensor | None, order: Tensor | None
) -> Tensor:
    if scale is not None:
        weight = weight / scale.float().reshape(weight.shape[0], 1, 1, -1)
    weight = weight if rotation is None else _rotated(weight, rotation)
    if order is None:
        return weight
    if weight.shape[0] > 1:
        raise PassError(f"an order of all channels would move them between {weight.shape[0]} "
                        "groups of a convolution. Remedy: leave it out")
    return weight[..., order]


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """The last axis times ``rotation``, block by block."""
    block, blocks = rotation.shape[-1], x.shape[-1] // rotation.shape[-1]
    if x.shape[-1] % block or (rotation.ndim == 3 and len(rotation) != blocks):
        raise PassError(f"a rotation of shape {list(rotation.shape)} does not fit "
                        f"{x.shape[-1]} channels")
    split = x.unflatten(-1, (blocks, block))
    if rotation.ndim == 2:
        return (split @ rotation.float()).flatten(-2)
    return torch.einsum("...bn,bnm->...bm", split, rotation.float()).flatten(-2)


def _rounded_rows(rows: Tensor, role: Role, bounds: Tensor | None) -> Tensor:
    fmt = parse(role.format)
    scales = None
    if fmt.granularity.kind == "tensor" and not fmt.two_level and bounds is not None:
        _, *scales = quantize(bounds, fmt).parts
    return fake_quantize(rows, fmt, scales=scales)


def _rounded_weight(weight: Tensor, fmt: ScaledFormat | None) -> Tensor:
    """Scales lie along inputs and taps, in the order in which they are stored."""
    if fmt is None:
        return weight
    stored = weight.mT.flatten(2).flatten(0, 1)  # [groups·outputs, inputs·taps]
    rounded = fake_quantize(stored, fmt)
    return rounded.reshape(*weight.shape[:2], weight.shape[3], weight.shape[2]).mT
