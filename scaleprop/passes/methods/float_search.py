"""LLM-FP4: how many of a float's bits are its exponent, where it clips, what channels are shifted.

Floats of one width differ in their exponent bits: E3M0 reaches far, E1M2 is even, E2M1 between. The
readers' output error chooses for each activation and each weight, together with the clipping
(S. Liu et al., LLM-FP4, arXiv:2310.16836, search of exponent bits and maximal value).

Channels of activations differ in size more than tokens do. An exponent bias per channel would
serve them, but cannot leave the sum; as powers of two relative to the tensor's real scale ρ it
becomes the weights' (the same, pre-shifted exponent bias):

    x_j → x_j·2^b_j,  w_j → w_j·2^−b_j,   b_j = clip(round(log2(max|x| / max|x_j|)), 0, most)

Powers of two round nothing in parameters of any binary float type. The paper bounds b_j by the
exponent's range; ``most`` is searched. Scales found at run time follow their own rule: only those
of static activations, and of weights, are clipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import parse
from scaleprop.formats.elements import FloatElement, element
from scaleprop.passes.transforms.base import Needs, Site, TransformPass, Work
from scaleprop.passes.transforms.region import Region
from scaleprop.passes.transforms.search import OutputError, site_scale
from scaleprop.passes.transforms.transform import Scale
from scaleprop.recipes.base import Role
from scaleprop.rules.channels import Kind

_LEAST = 1e-5  # of a channel that is always 0
_KIND: Kind = "scale"


@dataclasses.dataclass(frozen=True)
class FloatSearch(TransformPass):
    """Choose exponent bits, clipping and shifts of channels for float formats (LLM-FP4).

    exponents: bits to try, those of the recipe besides. shifts: the largest b_j to try.
    clips: shares of a static activation's range to try.
    """

    exponents: tuple[int, ...] = (1, 2, 3, 4, 5)
    shifts: tuple[int, ...] = (2, 4, 8)
    clips: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

    name: ClassVar[str] = "float-search"
    needs: ClassVar[Needs] = Needs(channels=True, sample=256)

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for numbers of bits below 1, shifts below 0, shares not in (0, 1].
        """
        if not all(1 <= bits <= 8 for bits in self.exponents):
            raise ConfigError(f"exponents={self.exponents!r} are bits, 1 to 8")
        if not all(most >= 0 for most in self.shifts):
            raise ConfigError(f"shifts={self.shifts!r} are powers of two, at least 0")
        if not self.clips or not all(0 < clip <= 1 for clip in self.clips):
            raise ConfigError(f"clips={self.clips!r} are shares of a range, in (0, 1]")

    def transform(self, work: Work) -> None:
        """Activations, region by region; then every weight."""
        done: set[str] = set()
        sites = [site for site in work.sites() if _float_roles(work, site)]
        for site in sites:
            if site.value.name in done:
                continue
            region = work.region(site, _KIND) if _activation(work, site) else None
            members = [site] if region is None else [
                member for member in work.covered(region, sites) if _activation(work, member)]
            done.update(member.value.name for member in members)
            self._choose(work, region, members)

    def _choose(self, work: Work, region: Region | None, sites: Sequence[Site]) -> None:
        """The shift that all sites share, each activation's role, each weight's role."""
        best: tuple[float, Tensor | None, list[_Choice]] | None = None
        for factor in (None, *(() if region is None else self._factors(work, region, sites))):
            found = [self._activations(work, site, _of_site(region, site, factor))
                     for site in sites]  # fmt: skip
            error = sum(item.error for item in found)
            if best is None or error < best[0]:
                best = error, factor, found
        assert best is not None
        _, factor, found = best
        chosen = [(reader, self._weight(work, site, reader, item))
                  for site, item in zip(sites, found, strict=True)
                  for reader in site.readers]  # before anything changes  # fmt: skip
        if region is not None and factor is not None and not work.apply(
            region, Scale(factor), "exponent biases moved into weights"
        ):
            return
        roles = dict(chosen)
        for site, item in zip(sites, found, strict=True):
            for reader in site.readers:
                old = work.assignment(reader)
                assert old is not None
                work.assign(reader, weight=roles[reader], extremes=item.extremes,
                            activation=old.activation if item.role is None else item.role)

    def _factors(self, work: Work, region: Region, sites: Sequence[Site]) -> Iterator[Tensor]:
        """[size of the region]: powers of two, at most 2^most for each of ``shifts``."""
        amax = work.pooled(region, {site: work.amax(site) for site in sites}).double()
        usable = amax > _LEAST  # of channels of no site: NaN
        bias = torch.log2(amax[usable].max() / amax).round() if bool(usable.any()) else amax
        for most in self.shifts:
            shift = torch.where(usable, bias, 0.0).clamp(0.0, most)
            yield region.shared(shift.exp2()).log2().round().exp2()

    def _activations(self, work: Work, site: Site, scale: Tensor | None) -> _Choice:
        """The best of an activation's formats and ranges, with weights as they are."""
        role = _activation(work, site)
        if role is None:
            return _Choice(OutputError(work, site)(scale=scale), None, None, scale)
        choices = []
        for changed in self._formats(role):
            error = OutputError(work, site, activation=changed)(scale=scale)
            choices.append(_Choice(error, changed, None, scale))
        best = min(choices, key=lambda item: item.error)
        if role.scaling == "static":
            measured = OutputError(work, site, activation=best.role)
            ends = measured.bounds(scale=scale)
            assert ends is not None  # calibration kept every channel's
            for clip in self.clips:
                extremes = float(ends[0]) * clip, float(ends[1]) * clip
                error = measured(scale=scale, extremes=extremes)
                if error < best.error or best.extremes is None:
                    best = _Choice(error, best.role, extremes, scale)
        return best

    def _weight(self, work: Work, site: Site, reader: torch.fx.Node, item: _Choice) -> Role | None:
        """The best of a weight's formats and clippings, with the activation chosen."""
        assignment = work.assignment(reader)
        if assignment is None or not _is_float(assignment.weight):
            return None if assignment is None else assignment.weight
        assert assignment.weight is not None
        alone = dataclasses.replace(site, readers=(reader,))
        errors: list[tuple[float, int, Role]] = []
        for changed in self._formats(assignment.weight):
            for clipping in ("amax", "mse"):
                role = dataclasses.replace(changed, clipping=clipping)
                measured = OutputError(work, alone, activation=item.role, weight=role)
                error = measured(scale=item.scale, extremes=item.extremes)
                errors.append((error, len(errors), role))
        return min(errors)[2]

    def _formats(self, role: Role) -> Iterator[Role]:
        """The role in every float of its width that its scales take."""
        fmt = parse(role.format)
        yield role
        if not _is_float(role):
            return
        for bits in self.exponents:
            name = f"e{bits}m{fmt.bits - 1 - bits}"
            if bits > fmt.bits - 1 or name == fmt.element.name:
                continue
            try:
                yield dataclasses.replace(role, format=str(fmt.replace(element=element(name))))
            except FormatError:  # a rule of scales that is made for one element
                continue


@dataclasses.dataclass(frozen=True, eq=False)
class _Choice:
    """What was found for a site: its role and range, and the scale that it was found with."""

    error: float
    role: Role | None
    extremes: tuple[float, float] | None
    scale: Tensor | None


def _is_float(role: Role | None) -> bool:
    return role is not None and isinstance(parse(role.format).element, FloatElement)


def _activation(work: Work, site: Site) -> Role | None:
    """What all of the site's readers read it in, where that is a float."""
    roles = {item.activation for reader in site.readers if (item := work.assignment(reader))}
    only = roles.pop() if len(roles) == 1 else None
    return only if _is_float(only) else None


def _float_roles(work: Work, site: Site) -> bool:
    weights = [item.weight for reader in site.readers if (item := work.assignment(reader))]
    return _activation(work, site) is not None or any(_is_float(role) for role in weights)


def _of_site(region: Region | None, site: Site, factor: Tensor | None) -> Tensor | None:
    if region is None or factor is None:
        return None
    return site_scale(factor, region, site)
