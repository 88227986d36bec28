"""Which dimensions of the inputs may vary, and what they are called."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from scaleprop.passes.base import Program

Wish = Literal["batch and sequence", "batch", "nothing"]
LADDER: tuple[Wish, ...] = ("batch and sequence", "batch", "nothing")

_ROLE_NAMES = {0: "batch", 1: "sequence"}


def default_axes(inputs: Any, wish: Wish) -> list[tuple[int, ...]]:
    """For each flattened input of ``(args, kwargs)`` the axes that should be dynamic.

    Axis 0 (batch), and for tensors of up to three dimensions axis 1 (sequence). In larger ones an
    axis counts as sequence where it has the length of one (masks), or where the tensor sits in a
    container and it is the last but one (key-value caches [batch, head, sequence, channel]); with
    such a cache a sequence of length 1 is a decoding step, and stays one.
    """
    paths, leaves = _flatten_with_depth(inputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    lengths = {t.shape[1] for t in tensors if t.ndim == 2 and not t.is_floating_point()} - {1}
    cached = [depth > 2 and isinstance(leaf, torch.Tensor) and leaf.ndim == 4
              for depth, leaf in zip(paths, leaves, strict=True)]  # fmt: skip

    def axes(leaf: Any, is_cache: bool) -> tuple[int, ...]:
        if wish == "nothing" or not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return ()
        if wish == "batch":
            return (0,)
        if leaf.ndim <= 3:
            is_step = any(cached) and leaf.ndim > 1 and leaf.shape[1] == 1
            return (0,) if is_step else tuple(range(min(leaf.ndim, 2)))
        if is_cache:
            return (0, 2)
        return (0, *(axis for axis in range(1, leaf.ndim) if leaf.shape[axis] in lengths))

    return [axes(leaf, is_cache) for leaf, is_cache in zip(leaves, cached, strict=True)]


def _flatten_with_depth(inputs: Any) -> tuple[list[int], list[Any]]:
    pairs = pytree.tree_flatten_with_path(inputs)[0]
    return [len(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def without_ones(leaves: Sequence[Any], axes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Inputs to trace with: a dynamic axis on which *every* tensor has size 1 is doubled.

    A size of 1 is specialised by tracing (it may broadcast). Where only some tensors have a 1, it
    is a broadcast, and stays.
    """
    changed = list(leaves)
    for axis in sorted({axis for wanted in axes for axis in wanted}):
        places = [index for index, wanted in enumerate(axes) if axis in wanted]
        if all(leaves[index].shape[axis] == 1 for index in places):
            for index in places:
                changed[index] = torch.cat([changed[index]] * 2, dim=axis)
    return changed


def as_dynamic_shapes(
    axes: Sequence[tuple[int, ...]], spec: pytree.TreeSpec, forward: Callable[..., Any]
) -> dict[str, Any]:
    """``torch.export``'s ``dynamic_shapes`` with ``Dim.AUTO`` on the given axes.

    spec: the pytree of ``(args, kwargs)``; forward: what they are given to, and named by.
    """
    shapes = iter([{axis: Dim.AUTO for axis in wanted} or None for wanted in axes])

    def mirror(node: pytree.TreeSpec) -> Any:
        if node.is_leaf():
            return next(shapes)
        children = [mirror(child) for child in node.children()]
        if node.type is tuple:
            return tuple(children)
        if node.type is dict:
            return dict(zip(node.context, children, strict=True))
        return children  # lists, and what torch.export writes for every other class

    args, kwargs = mirror(spec)
    # as torch.export binds them: *args is one tuple, **kwargs one dict
    return dict(inspect.signature(forward).bind_partial(*args, **kwargs).arguments)


def argument_names(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Parameter name → value, as ``torch.export`` names a model's inputs."""
    bound = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, parameter in inspect.signature(forward).parameters.items():
        if name not in bound:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(bound[name])
        else:
            named[name] = bound[name]
    return named


def user_names(dynamic_shapes: Any, inputs: Any) -> list[tuple[torch.Tensor, dict[int, str]]]:
    """The ``Dim`` names that a user gave: pairs of an input tensor and {axis: name}."""
    if dynamic_shapes is None or inputs is None:
        return []
    if isinstance(inputs, torch.Tensor):
        keyed = isinstance(dynamic_shapes, Mapping)
        by_axis = dict(dynamic_shapes if keyed else enumerate(dynamic_shapes))
        names = {axis: dim.__name__ for axis, dim in by_axis.items() if isinstance(dim, Dim)}
        return [(inputs, names)]
    if isinstance(inputs, Mapping):
        return [
            pair
            for key, value in inputs.items()
            if isinstance(dynamic_shapes, Mapping)
            for pair in user_names(dynamic_shapes.get(key), value)
        ]
    if isinstance(inputs, (list, tuple)):
        return [
            pair
            for value, shapes in zip(inputs, dynamic_shapes, strict=False)
            for pair in user_names(shapes, value)
        ]
    return []


def is_symbolic(size: Any) -> bool:
    """Whether a size may vary; tracing can leave a symbol behind that stands for one number."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def example_sizes(program: Program) -> dict[Any, int]:
    """Symbol → its size in the example inputs. (Tracing takes 2 for a size of 1.)"""
    return {
        size.node.expr: leaf.shape[axis]
        for node, leaf in zip(program.placeholders, program.example_leaves, strict=True)
        if isinstance(leaf, torch.Tensor)
        for axis, size in enumerate(node.meta["val"].shape)
        if is_symbolic(size) and size.node.expr.is_Symbol
    }


def with_plain_sizes(value: torch.Tensor) -> torch.Tensor:
    """A fake value whose sizes that cannot vary are integers; itself where they are."""

    def plain(size: int | torch.SymInt) -> int | torch.SymInt:
        return size if is_symbolic(size) else int(size)

    leftover = [size for size in value.shape if isinstance(size, torch.SymInt)]
    if all(is_symbolic(size) for size in leftover):
        return value
    return value.as_strided([plain(size) for size in value.shape],
                            [plain(stride) for stride in value.stride()])


def name_dimensions(
    placeholders: Sequence[torch.fx.Node], given: Mapping[str, Mapping[int, str]]
) -> dict[str, dict[int, str]]:
    """Input name → {axis: dimension name} for every symbolic size. Equal symbols share a name.

    given: the user's names, which win; else ``batch`` and ``sequence`` by axis, numbered when two
        different symbols would share one.
    """
    names: dict[str, str] = {}
    found: dict[str, dict[int, Any]] = {}
    for node in placeholders:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        found[node.name] = {
            axis: size for axis, size in enumerate(value.shape) if is_symbolic(size)
        }
    for node, sizes in found.items():
        for axis, size in sizes.items():
            if (name := given.get(node, {}).get(axis)) and size.node.expr.is_symbol:
                names.setdefault(str(size), name)
    for sizes in found.values():
        for axis, size in sizes.items():
            if size.node.expr.is_symbol and str(size) not in names:
                names[str(size)] = _fresh(_ROLE_NAMES.get(axis, f"length{axis}"), names)
    return {
        node: {axis: spell(size, names) for axis, size in sizes.items()}
        for node, sizes in found.items()
        if sizes
    }


def _fresh(name: str, taken: Mapping[str, str]) -> str:
    if name not in taken.values():
        return name
    numbered = (f"{name}_{index}" for index in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken.values())


def symbol_names(program: Program) -> dict[str, str]:
    """Symbol → what ``program.dynamic_axes`` calls the dimension; the first name counts."""
    names: dict[str, str] = {}
    for node in program.placeholders:
        for axis, name in program.dynamic_axes.get(node.name, {}).items():
            size = node.meta["val"].shape[axis]
            if is_symbolic(size):  # a number would be spelt as a dimension wherever it occurs
                names.setdefault(str(size), name)
    return names


def spell(size: torch.SymInt | str, names: Mapping[str, str]) -> str:
    """``batch`` or ``8*sequence`` for a symbolic size or its text; names: symbol → dimension."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size))
