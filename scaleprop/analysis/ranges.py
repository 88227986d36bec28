"""What values would lose in formats without a scale, and which values are others' elements."""

from __future__ import annotations

import torch.fx

from scaleprop.formats.elements import FloatElement, element
from scaleprop.passes.statistics import Measured
from scaleprop.report.scales import FORMATS
from scaleprop.rules import rule_for


def lost_below(seen: Measured, name: str) -> float:
    """The share of values other than 0 that are below the format's smallest positive number."""
    fmt = _float(name)
    return seen.below(fmt.emin - fmt.fraction_bits)


def lost_above(seen: Measured, name: str) -> float:
    """The share that is beyond its largest, of what was measured with ``LIMITS``."""
    return seen.above.get(_float(name).max, 0.0)


def is_moved(node: torch.fx.Node) -> bool:
    """Whether ``node`` holds its argument's elements, moved."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    return rule is not None and rule.moves


def _float(name: str) -> FloatElement:
    found = element(name)
    assert isinstance(found, FloatElement)
    return found


LIMITS = tuple(_float(name).max for name in FORMATS)
