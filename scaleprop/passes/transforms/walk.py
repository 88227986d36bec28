"""Region by region: what methods share that scale channels, or shift and then scale them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import CalibrationError, describe
from scaleprop.formats import parse
from scaleprop.passes.transforms.base import Site, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.search import RegionError
from scaleprop.passes.transforms.transform import Scale, Shift
from scaleprop.rules import rule_for
from scaleprop.rules.channels import Kind

_WORTH = 0.9  # an operator at run time must save a tenth of the squared error


def regions(
    work: Work, kind: Kind, wanted: Callable[[Site], bool] = lambda site: True
) -> Iterator[tuple[Region, list[Site]]]:
    """Each region of quantized values once, with the sites that it covers.

    wanted: which sites may start one. A site where the transform would be undone right before its
    readers is refused.
    """
    sites = work.sites()
    done: set[str] = set()
    for site in sites:
        if site.value.name in done or not wanted(site):
            continue
        region = work.region(site, kind)
        if region is None:
            continue
        covered = work.covered(region, sites)
        if site not in covered:
            reasons = "; ".join(str(cut) for cut in region.cuts if cut.user in site.readers)
            work.refuse(site.value, kind, reasons or "its readers cannot take it")
            continue
        done.update(member.value.name for member in covered)
        yield region, covered


def extremes(work: Work, site: Site) -> tuple[Tensor, Tensor]:
    """[K] each: the least and the largest value of each channel that calibration saw.

    Raises:
        CalibrationError: where it kept no figures per channel.
    """
    seen = work.statistics(site)
    if seen.channel_min is None or seen.channel_max is None:
        raise CalibrationError(
            f"{describe(site.value)}: calibration kept no extremes per channel. Remedy: a method "
            "that reads them asks for them, needs = Needs(channels=True)"
        )
    return seen.channel_min, seen.channel_max


def bounds(work: Work, region: Region, sites: Iterable[Site]) -> tuple[Tensor, Tensor]:
    """[size of the region] float64 each: least and largest value of its channels, over all of the
    sites; 0 for channels of no site."""
    ends = {site: extremes(work, site) for site in sites}
    low = work.pooled(region, {site: end[0] for site, end in ends.items()}, largest=False)
    high = work.pooled(region, {site: end[1] for site, end in ends.items()})
    return low.nan_to_num(0.0), high.nan_to_num(0.0)


def middle(low: Tensor, high: Tensor) -> Tensor:
    """(low + high)/2: the shift that makes a range symmetric."""
    return (low + high) / 2


def shift_channels(
    work: Work,
    centre: Callable[[Tensor, Tensor], Tensor] = middle,
    wanted: Callable[[Site], bool] = lambda site: True,
) -> None:
    """x − z in every region: biases absorb z, and W·z joins the biases of the readers.

    centre: z, from the least and the largest value of each channel. What only an operator at run
    time can do is done where the readers' error falls. What is known of the values moves with
    them, so that a search may follow. wanted: as in ``regions``.
    """
    for region, covered in regions(work, "shift", wanted):
        shift = centre(*bounds(work, region, covered))
        if not bool(shift.any()):
            continue
        if not region.is_free and not falls(work, region, covered, shift=shift):
            continue  # measured only where it costs something
        seen = {site: work.statistics(site) for site in covered}
        if not work.apply(region, Shift(shift), "shifted"):
            continue
        for site, found in seen.items():
            codes = torch.from_numpy(region.members[site.value].codes).reshape(-1)
            own = torch.where(codes < 0, 0.0, shift[codes.clamp_min(0) >> 1])
            _note(work, site, _shifted(found, own))


def falls(
    work: Work, region: Region, covered: list[Site], *, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> bool:  # fmt: skip
    """Whether the readers' error falls enough for an operator at run time; else the region is
    refused."""
    error = RegionError(work, region, covered)
    return _pays(work, region, error(), error(scale=scale, shift=shift))


def _pays(work: Work, region: Region, before: float, after: float) -> bool:
    if region.is_free or after < _WORTH * before:
        return True
    work.refuse(region.seed, region.kind, "it would take an operator at run time, and its readers' "
                f"relative squared error would only go from {before:.3g} to {after:.3g}")
    return False


def best_scale(
    work: Work, region: Region, covered: list[Site], candidates: Iterable[Tensor], why: str
) -> float | None:
    """Apply the scale [size of the region] of least error of the readers, if it is less than that
    of none; its error, or None where nothing was done.

    candidates: factors of the values, positive; made consistent here.
    """
    error = RegionError(work, region, covered)
    before = error()
    least, best = before, None
    for candidate in candidates:
        scale = region.shared(candidate)
        if (found := error(scale=scale)) < least:
            least, best = found, scale
    if best is None or not _pays(work, region, before, least):
        return None
    return least if work.apply(region, Scale(best), why) else None


def after_norm(site: Site) -> bool:
    """Whether a norm with a weight of its own makes the value: it absorbs factors at no cost."""
    rule = rule_for(site.value.target)
    return rule is not None and rule.family == "norm"


def rounds_activations(work: Work, site: Site) -> bool:
    """Whether some reader quantizes the value."""
    found = [work.assignment(reader) for reader in site.readers]
    return any(item is not None and item.activation is not None for item in found)


def zero_points(work: Work, site: Site) -> bool:
    """Whether the readers' formats for the value have zero points, so that 0 may lie anywhere."""
    found = [work.assignment(reader) for reader in site.readers]
    roles = [item.activation for item in found if item is not None and item.activation is not None]
    return bool(roles) and all(parse(role.format).zero_point for role in roles)


def substitute(work: Work, user: torch.fx.Node, slot: int, value: Tensor, why: str) -> None:
    """``user`` reads the constant ``value`` in ``slot``, which takes the name of what it read where
    nothing else reads that."""
    args: list[Any] = [*user.args, *[None] * (slot + 1 - len(user.args))]
    old = args[slot]
    named = isinstance(old, torch.fx.Node) and old.op == "get_attr"
    name = str(old.target) if named else f"{user.name}_operand{slot}"
    args[slot] = work.rewriter.constant(value.contiguous(), name, at=user, why=why)
    user.args = tuple(args)
    if named and not old.users:
        work.rewriter.take_name(old, args[slot])
    work.rewriter.modified = True


def _note(work: Work, site: Site, statistics: TensorStatistics) -> None:
    """What is now known of what the site's readers read."""
    value = site.readers[0].args[0]
    assert isinstance(value, torch.fx.Node)
    program = work.rewriter.program
    work.rewriter.program = program.replace(
        statistics={**program.statistics, value.name: statistics})  # fmt: skip


def _shifted(seen: TensorStatistics, shift: Tensor) -> TensorStatistics:
    """Extremes and rows, shifted; all other figures are those of the rows."""
    assert seen.reservoir is not None and seen.channels is not None
    rows = (seen.reservoir.rows.double() - shift).float()
    found = TensorStatistics.of(rows, channels=True)
    assert found.channels is not None
    low, high = (end.double() - shift for end in (seen.channels.min, seen.channels.max))
    kept = dataclasses.replace(found.channels, min=low.float(), max=high.float())
    return dataclasses.replace(
        found, min=float(low.min()), max=float(high.max()), axis=seen.axis, channels=kept,
        channel_amax=kept.amax, reservoir=dataclasses.replace(seen.reservoir, rows=rows),
    )  # fmt: skip
