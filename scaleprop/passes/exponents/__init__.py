"""Scalar scales as integer exponents: a value v is held as the data v·2^-e(v).

``facts`` says which values have a scale at all, ``carry`` rewrites a graph so that its values are
held at wanted exponents and its results stay as they were.
"""

from scaleprop.passes.exponents.carry import Carried, carry, most
from scaleprop.passes.exponents.facts import has_scale

__all__ = ["Carried", "carry", "has_scale", "most"]
