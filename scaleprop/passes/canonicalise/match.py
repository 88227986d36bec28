"""Small questions that the rewrites ask of nodes, and how they say no."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.fx

from scaleprop.errors import describe

logger = logging.getLogger("scaleprop.passes.canonicalise")

aten = torch.ops.aten


def refuse(node: torch.fx.Node, reason: str) -> None:
    """No match, and why."""
    logger.debug("%s: %s", describe(node), reason)


def is_call(node: Any, *ops: Any) -> bool:
    """Whether ``node`` calls one of ``ops``."""
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target in ops


def argument(node: torch.fx.Node, index: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of ``node``."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def sizes(node: Any) -> tuple[Any, ...]:
    """The shape of a node's fake value; () where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's fake value."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value.dtype if isinstance(value, torch.Tensor) else None


def other_operand(node: torch.fx.Node, operand: torch.fx.Node) -> Any:
    """Of a commutative binary node, the argument that is not ``operand``, if there is one."""
    first, second = node.args[:2]
    if first is operand and second is not operand:
        return second
    return first if second is operand and first is not operand else None
