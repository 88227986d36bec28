"""Unit scaling of a forward graph: constants forward and backward, initialisation, step sizes."""

from scaleprop.passes.unit.module import UnitScaled
from scaleprop.passes.unit.scale import UnitScaling, unit_scaled
from scaleprop.passes.unit.schemes import SchemeName

__all__ = ["SchemeName", "UnitScaled", "UnitScaling", "unit_scaled"]
