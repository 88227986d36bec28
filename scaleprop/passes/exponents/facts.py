"""Which values of a graph have a scale: float tensors that are more than zeros and infinities."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.fx

from scaleprop.rules import rule_for
from scaleprop.rules.laws import scale_free

aten: Any = torch.ops.aten

# operator → the argument that every element of its output equals
_FILLED = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
}
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


def is_float(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a node's value is a real floating-point tensor."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def has_scale(node: torch.fx.Node) -> bool:
    """Whether ``node`` is a float tensor whose values mean something else at another scale.

    Masks, places and integers do not; nor do tensors of zeros or ±∞, which every scale leaves as
    they are.
    """
    return is_float(node.meta.get("val")) and not _is_scale_free(node)


def _is_scale_free(node: torch.fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _ZEROS:
        return True
    if node.target in _FILLED:
        place = _FILLED[node.target]
        return len(node.args) > place and scale_free(node.args[place])
    rule = rule_for(node.target)
    source = node.args[0] if node.args else None
    moved = rule is not None and rule.moves and isinstance(source, torch.fx.Node)
    return moved and _is_scale_free(source)  # type: ignore[arg-type]
