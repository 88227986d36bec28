"""ATen (and ``scaleprop::*``) operator → the function that lowers it to ONNX nodes.

A lowering has the operator's own signature behind the context and the graph node::

    @lowers(torch.ops.aten.relu.default)
    def relu(ctx: Context, node: Node, x: Arg) -> ir.Value:
        return ctx.builder.op("Relu", ctx.value(x))

Arguments arrive as they stand in the FX graph (nodes, numbers, lists of these). The result is an
``ir.Value``; a list of them for an operator with several outputs; ``None`` where the node computes
nothing (assertions); or any object that the lowerings of its users understand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.fx

from scaleprop.errors import UnsupportedOpError, describe

Lowering = Callable[..., Any]
_Function = TypeVar("_Function", bound=Lowering)
_LOWERINGS: dict[Any, Lowering] = {}


def lowers(*targets: Any) -> Callable[[_Function], _Function]:
    """Register a function as the lowering of every operator overload in ``targets``.

    Raises:
        ValueError: where an operator already has one.
    """

    def register(function: _Function) -> _Function:
        for target in targets:
            if target in _LOWERINGS:
                raise ValueError(f"{target} already has the lowering {_LOWERINGS[target]}")
            _LOWERINGS[target] = function
        return function

    return register


def lowering_of(node: torch.fx.Node) -> Lowering:
    """The lowering of ``node``'s operator.

    Raises:
        UnsupportedOpError: naming node, operator, source line and remedy.
    """
    found = _LOWERINGS.get(node.target)
    if found is None:
        raise UnsupportedOpError(
            f"{describe(node)}: no ONNX lowering; remedy: register one with "
            f"scaleprop.backends.onnxruntime.registry.lowers, or use backend='inductor' or "
            f"'reference'"
        )
    return found


def is_lowered(target: Any) -> bool:
    """Whether an operator has a lowering."""
    return target in _LOWERINGS
