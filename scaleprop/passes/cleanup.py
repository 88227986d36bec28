"""Clean-up: drop what capture leaves behind and computes nothing.

Assertions, copies that copy nothing, dropout in eval mode, slices and views of everything, and
equal pure nodes (one of them stays). Exact: no arithmetic is touched.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop._torch_compat import OpOverload
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.rewrite import Rewriter
from scaleprop.rules.axes import same_size

aten = torch.ops.aten

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,  # pyright: ignore[reportPrivateUsage]
    aten._assert_async.msg,  # pyright: ignore[reportPrivateUsage]
    aten._assert_scalar.default,  # pyright: ignore[reportPrivateUsage]
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}


@dataclasses.dataclass(frozen=True)
class CleanUp(Pass):
    """Remove assertions, no-ops and duplicates."""

    name: ClassVar[str] = "clean-up"
    preserves_function: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The same function with fewer nodes."""
        rewriter = Rewriter(program, self.name)
        before = len(rewriter.graph.nodes)
        seen: dict[Any, torch.fx.Node] = {}
        for node in list(rewriter.graph.nodes):
            if node.op == "call_function" and node.target in _ASSERTIONS:
                rewriter.graph.erase_node(node)
                rewriter.modified = True
            elif (source := _source_of_no_op(node)) is not None:
                rewriter.replace(node, source)
            elif node.target is aten.view.default and _follows_attention(node):
                node.target = aten.reshape.default
                rewriter.modified = True
            elif (key := _key(node)) is not None:
                if key in seen:
                    rewriter.replace(node, seen[key])
                else:
                    seen[key] = node
        rewriter.modified |= rewriter.graph.eliminate_dead_code()
        removed = before - len(rewriter.graph.nodes)
        return PassResult(
            rewriter.finish(), rewriter.modified, (f"{removed} of {before} nodes removed",)
        )


def _source_of_no_op(node: torch.fx.Node) -> torch.fx.Node | None:
    """The node whose value ``node`` merely repeats."""
    check = _NO_OPS.get(node.target) if node.op == "call_function" else None
    if check is None:
        return None
    if node.target is operator.getitem:
        return check(node)
    source = node.args[0]
    value = node.meta.get("val")
    if not isinstance(source, torch.fx.Node) or not isinstance(value, torch.Tensor):
        return None
    given = source.meta.get("val")
    same = (
        isinstance(given, torch.Tensor)
        and given.dtype == value.dtype
        and given.device == value.device
        and same_sizes(given.shape, value.shape)
    )
    return source if same and check(node) else None


def _follows_attention(node: torch.fx.Node) -> bool:
    """The strides of attention's output depend on the kernel that runs, which tracing need not
    have picked; a view of it can be impossible where a reshape copies."""
    source: Any = node.args[0]
    while isinstance(source, torch.fx.Node) and source.target is aten.permute.default:
        source = source.args[0]
    return (
        isinstance(source, torch.fx.Node)
        and source.target is aten.scaled_dot_product_attention.default
    )


def same_sizes(left: Any, right: Any) -> bool:
    """Equal shapes (or strides) for every value of the symbols."""
    return len(left) == len(right) and all(map(same_size, left, right))


def _same_layout(node: torch.fx.Node) -> bool:
    source: Any = node.args[0]
    return same_sizes(source.meta["val"].stride(), node.meta["val"].stride())


def _whole_slice(node: torch.fx.Node) -> bool:
    # the shapes are equal already; a step or an offset could still reorder nothing
    return _argument(node, 4, 1) == 1


def _is_identity_permutation(node: torch.fx.Node) -> bool:
    dims: Any = node.args[1]
    return [dim % len(dims) for dim in dims] == list(range(len(dims)))


def _neutral(element: int, floats: bool) -> Callable[[torch.fx.Node], bool]:
    """x ∘ element = x. Adding 0 turns −0.0 into 0.0, so for ``add`` only integers count."""

    def check(node: torch.fx.Node) -> bool:
        other = node.args[1]
        is_number = isinstance(other, (int, float)) and not isinstance(other, bool)
        allowed = floats or not node.meta["val"].is_floating_point()
        return bool(is_number and other == element and allowed and not node.kwargs)

    return check


def _dropout_in_eval(node: torch.fx.Node) -> torch.fx.Node | None:
    source, index = node.args
    if (
        isinstance(source, torch.fx.Node)
        and source.target is aten.native_dropout.default
        and index == 0
        and source.args[2] is False
    ):
        first = source.args[0]
        return first if isinstance(first, torch.fx.Node) else None
    return None


def _argument(node: torch.fx.Node, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _always(_node: torch.fx.Node) -> bool:
    return True


_NO_OPS: dict[Any, Callable[[torch.fx.Node], Any]] = {
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.clone.default: _same_layout,
    aten._to_copy.default: _same_layout,  # pyright: ignore[reportPrivateUsage]
    aten.dropout.default: lambda node: node.args[2] is False,
    aten.slice.Tensor: _whole_slice,
    aten.view.default: _always,
    aten.expand.default: _always,
    aten.permute.default: _is_identity_permutation,
    aten.add.Tensor: _neutral(0, floats=False),
    aten.mul.Tensor: _neutral(1, floats=True),
    aten.div.Tensor: _neutral(1, floats=True),
    operator.getitem: _dropout_in_eval,
}


def _key(node: torch.fx.Node) -> Any:
    """What makes two nodes equal; None where a node may not be merged."""
    if node.op == "get_attr":
        return ("get_attr", node.target)
    if node.op != "call_function" or not _is_pure(node.target):
        return None
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    # 1, 1.0 and True are equal in Python, and different arguments
    parts = tuple(
        leaf if isinstance(leaf, torch.fx.Node) else (type(leaf), repr(leaf)) for leaf in leaves
    )
    return (node.target, parts, str(spec))


def _is_pure(target: Any) -> bool:
    if isinstance(target, OpOverload):
        random = torch.Tag.nondeterministic_seeded in target.tags
        return not random and not target._schema.is_mutable  # pyright: ignore[reportPrivateUsage]
    return getattr(target, "__module__", "") in ("_operator", "torch", "math")
