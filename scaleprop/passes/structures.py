"""Make the containers of a model's inputs and outputs known to pytree: they survive capture.

Tuples, lists and dicts are known to torch; a dataclass or a plain object that carries tensors in
its attributes (a key-value cache, for instance) becomes known here, when a model first uses it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop.errors import UnsupportedOpError

logger = logging.getLogger(__name__)

_LEAVES = (torch.Tensor, int, torch.SymInt, float, complex, bool, str, bytes, type(None),
           torch.dtype, torch.device, torch.nn.Module, type)  # fmt: skip

# attribute names that hold tensors, those that do not, and the values of the latter
_Context = tuple[tuple[str, ...], tuple[str, ...], tuple[Any, ...]]


def register_structures(tree: Any) -> tuple[type, ...]:
    """Register every class in ``tree`` that pytree would take for a leaf although it holds tensors.

    Returns the classes that were new. Attributes without tensors become part of the structure.
    """
    found: list[type] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, _LEAVES) or not _holds_tensors(leaf):
            continue
        cls = type(leaf)
        if cls not in pytree.SUPPORTED_NODES:
            register_class(cls)
            found.append(cls)
        found.extend(register_structures(vars(leaf)))
    return tuple(found)


def register_class(cls: type) -> None:
    """Teach pytree to take instances of ``cls`` apart into the attributes that hold tensors."""
    if cls in pytree.SUPPORTED_NODES:
        return
    logger.info("pytree: instances of %s.%s are containers", cls.__module__, cls.__qualname__)
    if dataclasses.is_dataclass(cls):
        torch.export.register_dataclass(cls)
        return

    def flatten(value: Any) -> tuple[list[Any], _Context]:
        attributes = vars(value)
        carrying = tuple(name for name in attributes if _is_data(attributes[name]))
        rest = tuple(name for name in attributes if name not in carrying)
        context = (carrying, rest, tuple(attributes[name] for name in rest))
        return [attributes[name] for name in carrying], context

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], _Context]:
        children, context = flatten(value)
        keys = [pytree.GetAttrKey(name) for name in context[0]]
        return list(zip(keys, children, strict=True)), context

    def unflatten(children: Iterable[Any], context: _Context) -> Any:
        carrying, rest, constants = context
        value: Any = object.__new__(cls)
        vars(value).update(zip(rest, constants, strict=True))
        vars(value).update(zip(carrying, children, strict=True))
        return value

    pytree.register_pytree_node(
        cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=_dump_context, from_dumpable_context=_load_context,
    )  # fmt: skip


def _dump_context(context: _Context) -> list[list[Any]]:
    carrying, rest, constants = context
    return [list(carrying), list(rest), [_dump_constant(value) for value in constants]]


def _load_context(dumped: list[list[Any]]) -> _Context:
    carrying, rest, constants = dumped
    return tuple(carrying), tuple(rest), tuple(_load_constant(value) for value in constants)


def _dump_constant(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedOpError(
        f"cannot save an attribute of type {type(value).__name__} in a model's structure; "
        "remedy: return tensors in tuples, dicts or dataclasses"
    )


def _load_constant(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return torch.device(value["device"]) if "device" in value else getattr(torch, value["dtype"])


def _is_data(value: Any) -> bool:
    """Whether an attribute may differ from call to call: tensors, and counts such as lengths."""
    is_count = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    return is_count or _holds_tensors(value)


def _holds_tensors(value: Any) -> bool:
    """Whether a tensor is reachable from ``value`` through containers and attributes."""
    pending, seen = [value], set[int]()
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            return True
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        if not pytree.tree_is_leaf(item):
            pending.extend(pytree.tree_leaves(item))
        elif hasattr(item, "__dict__"):
            pending.extend(vars(item).values())
    return False
