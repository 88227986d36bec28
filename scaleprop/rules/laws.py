"""Homogeneity that depends on an operator's constants.

Zero and ±∞ are the same at every scale; no other number is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from scaleprop.rules.base import Homogeneity

PASSES = Homogeneity({0: 1})


def scale_free(value: Any) -> bool:
    """Whether a Python number is the same at every scale."""
    return isinstance(value, (int, float)) and (value == 0 or math.isinf(value))


def constant(node: torch.fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def passes_with(
    index: int, name: str, default: Any = None
) -> Callable[[torch.fx.Node], Homogeneity | None]:
    """Argument 0 passes its scale where the constant ``name`` is scale-free."""

    def law(node: torch.fx.Node) -> Homogeneity | None:
        return PASSES if scale_free(constant(node, index, name, default)) else None

    return law


def compared(node: torch.fx.Node) -> Homogeneity | None:
    """x ⋛ number: signs and infinities can be told at any scale."""
    return Homogeneity({0: 0}) if scale_free(node.args[1]) else None


def clamp(node: torch.fx.Node) -> Homogeneity | None:
    """clamp(x, min, max)."""
    bounds = (constant(node, 1, "min"), constant(node, 2, "max"))
    return PASSES if all(bound is None or scale_free(bound) for bound in bounds) else None


def power(node: torch.fx.Node) -> Homogeneity | None:
    """x^n for the n that are products: a power of two stays one.

    PyTorch takes the others through logarithms, which round differently at another scale.
    """
    exponent: Any = node.args[1]
    return Homogeneity({0: int(exponent)}) if exponent in (-2, -1, 0, 1, 2, 3) else None


def shifted(node: torch.fx.Node) -> Homogeneity | None:
    """x ± number."""
    return PASSES if scale_free(node.args[1]) else None


def quotient(node: torch.fx.Node) -> Homogeneity | None:
    """x / y, where nothing is rounded to whole numbers."""
    whole = node.kwargs.get("rounding_mode") is not None
    return None if whole else Homogeneity({0: 1, 1: -1})


def multiplied(node: torch.fx.Node) -> Homogeneity | None:
    """prod(x, dim): as many factors as were multiplied; None where their number is a symbol."""
    source: Any = node.args[0]
    shape = source.meta["val"].shape
    over = shape if len(node.args) < 2 else (shape[node.args[1]],)  # type: ignore[index]
    if not all(isinstance(size, int) for size in over):
        return None
    return Homogeneity({0: math.prod(over)})


def gathered_up(node: torch.fx.Node) -> Homogeneity | None:
    """scatter_reduce(self, dim, index, src, reduce), but for products."""
    reduce = constant(node, 4, "reduce")
    return None if reduce == "prod" else Homogeneity(follows=(0, 3))


def distance(node: torch.fx.Node) -> Homogeneity | None:
    """cdist(x, y, p), for the p that ``counted`` passes."""
    exact = constant(node, 2, "p", 2) in (1, 2, math.inf)
    return Homogeneity(follows=(0, 1)) if exact else None


def cast(node: torch.fx.Node) -> Homogeneity | None:
    """Between float types: rounding is relative, and powers of two move only the exponent."""
    source: Any = node.args[0]
    types = [value.dtype for value in (source.meta["val"], node.meta["val"])]
    return PASSES if all(dtype.is_floating_point for dtype in types) else None


def threshold_gradient(node: torch.fx.Node) -> Homogeneity | None:
    """threshold_backward(dy, x, threshold): where x > threshold."""
    return Homogeneity({0: 1, 1: 0}) if scale_free(node.args[2]) else None


def counted(node: torch.fx.Node) -> Homogeneity | None:
    """The p-norm, in units of x, but for p = 0, which counts, and the p whose powers and roots are
    taken through logarithms, which round differently at another scale."""
    return PASSES if constant(node, 1, "ord", 2) in (1, 2, math.inf, -math.inf) else None
