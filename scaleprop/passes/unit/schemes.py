"""Unit scaling's schemes: how streams are weighted, and what a readout is divided by."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

from scaleprop.errors import ConfigError
from scaleprop.passes.unit.structure import Residual, Structure

SchemeName = Literal["unit", "u-mup", "mus"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """weights: of the stream and of the branch at a residual sum; their squares sum to 1.
    readout: what a readout's result is multiplied by, from its fan-in."""

    name: SchemeName
    weights: Callable[[Structure, Residual], tuple[float, float]]
    readout: Callable[[int], float]


def _equal_parts(structure: Structure, residual: Residual) -> tuple[float, float]:
    """Every branch ends with the same share, and what the stream began with has half of a branch's
    times their number (Blake et al., u-µP, 2024, section 4.3 with all multipliers 1):
    τ² = 1/(L/2 + i) for the i-th of L. A stream of one branch is weighted evenly."""
    count = structure.length(residual.stream)
    squared = 1.0 if count == 1 else 1.0 / (count / 2 + residual.index)
    return math.sqrt(1 / (1 + squared)), math.sqrt(squared / (1 + squared))


def _fixed_share(structure: Structure, residual: Residual) -> tuple[float, float]:
    """√(1−τ)·x + √τ·f(x) (Narayan et al., µnit Scaling, 2025, section 3); τ = 0.4 at four layers
    of two branches, as there; inversely to depth beyond, which is our choice."""
    share = min(0.4, 3.2 / structure.length(residual.stream))
    return math.sqrt(1 - share), math.sqrt(share)


_SCHEMES = {
    "unit": Scheme(name="unit", weights=_equal_parts, readout=lambda fan_in: fan_in**-0.5),
    "u-mup": Scheme(name="u-mup", weights=_equal_parts, readout=lambda fan_in: 1 / fan_in),
    "mus": Scheme(name="mus", weights=_fixed_share, readout=lambda fan_in: 1 / fan_in),
}


def scheme(name: str) -> Scheme:
    """A scheme by name.

    Raises:
        ConfigError: for an unknown one.
    """
    if name not in get_args(SchemeName):
        raise ConfigError(f"unknown scheme {name!r}; known: {', '.join(get_args(SchemeName))}")
    return _SCHEMES[name]
