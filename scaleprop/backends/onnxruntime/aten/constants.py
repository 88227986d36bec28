"""Operators on constants are computed while lowering: small results, and views of any size."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import map_arg

from scaleprop.backends.onnxruntime.context import Context, Node, is_symbolic

_LIMIT = 1 << 16  # elements; larger results stay operators, so that the file does not grow
_NOT_FOLDED = frozenset({"clone", "detach", "alias", "contiguous", "lift_fresh_copy", "dropout",
                         "empty", "empty_like", "new_empty", "empty_permuted"})  # fmt: skip


def fold(ctx: Context, node: Node) -> Any:
    """The value of an ATen node whose inputs are all constant; None where it must be emitted."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":  # pyright: ignore[reportPrivateUsage]
        return None
    name = target.overloadpacket.__name__
    if name in _NOT_FOLDED or name.startswith("_assert"):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    if not all(_is_constant(ctx.result(source)) for source in node.all_input_nodes):
        return None
    if not _is_small(node) and (name == "expand" or not _is_view(target)):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), ctx.result)
    if name in ("view", "_unsafe_view"):  # clones are not made here, so strides may not fit
        target = torch.ops.aten.reshape.default
    with torch.no_grad():
        result = target(*args, **kwargs)
    return list(result) if isinstance(result, tuple) else result


def _is_constant(result: Any) -> bool:
    if isinstance(result, (list, tuple)):
        return all(isinstance(part, torch.Tensor) for part in result)
    return isinstance(result, (torch.Tensor, bool, int, float))


def _is_small(node: Node) -> bool:
    values = node.meta["val"]
    values = values if isinstance(values, (list, tuple)) else [values]
    return all(
        isinstance(value, torch.Tensor)
        and not any(is_symbolic(size) for size in value.shape)
        and value.numel() <= _LIMIT
        for value in values
    )


def _is_view(target: torch._ops.OpOverload) -> bool:  # pyright: ignore[reportPrivateUsage]
    return any(result.alias_info is not None for result in target._schema.returns)  # pyright: ignore[reportPrivateUsage]
