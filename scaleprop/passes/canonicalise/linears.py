"""Linears: every product of activations with a parameter becomes ``aten.linear`` with w [N, K].

    addmm(b, x, w)      →  linear(x, wᵀ, b)        mm(x, w), matmul(x, w)  →  linear(x, wᵀ)
    … with permute(w)   →  linear(x, w, …)         linear(x, w) + b        →  linear(x, w, b)
    linear(view(x), …)  →  view(linear(x, …))      where only leading axes are regrouped
    linear(x, f(w), …) where f only moves elements →  linear(x, w', …)
    embedding by index_select(w, 0, ids)           →  embedding(w, ids)

A parameter kept as [K, N], or of which linears read slices, is rearranged once, here; the old
tensor goes when nothing reads it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from scaleprop.passes.canonicalise.match import argument, aten, is_call, refuse, sizes
from scaleprop.passes.rewrite import Rewriter
from scaleprop.rules import rule_for
from scaleprop.rules.axes import match_axes

_TRANSPOSE_OF = "scaleprop.transpose_of"  # in node.meta: the node whose transpose a constant is
_PRODUCTS = (aten.mm.default, aten.matmul.default)


def rewrite(rewriter: Rewriter) -> int:
    """Rewrite in place; returns how many."""
    steps = (
        _fold_moved_weight,
        _from_product,
        _from_addmm,
        _lift_view,
        _absorb_bias,
        _from_index_select,
    )
    count = 0
    for step in steps:
        for node in list(rewriter.graph.nodes):
            if node.op == "call_function":
                count += step(rewriter, node)
    return count


def _fold_moved_weight(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    """A linear whose weight is a slice (view, permutation, …) of a parameter."""
    if not is_call(node, aten.linear.default):
        return False
    folded = False
    for operand in node.args[1:3]:
        if not isinstance(operand, torch.fx.Node) or operand.op == "get_attr":
            continue
        moved = _moved_parameter(rewriter, operand)
        if moved is None:
            refuse(node, f"its operand {operand.name} is computed")
            continue
        target, tensor = moved
        constant = rewriter.constant(
            tensor.detach().clone(memory_format=torch.contiguous_format),
            f"{target}_part",
            at=node,
            why=f"what {operand.name} takes from {target}",
        )
        node.replace_input_with(operand, constant)
        rewriter.modified = folded = True
    return folded


def _moved_parameter(rewriter: Rewriter, node: Any) -> tuple[str, Any] | None:
    """(parameter, value) of a node that only moves elements of one parameter."""
    if not isinstance(node, torch.fx.Node):
        return None
    tensor = rewriter.tensor(node)
    if tensor is not None:
        return str(node.target), tensor
    rule = rule_for(node.target) if node.op == "call_function" else None
    is_item = node.target is operator.getitem
    if not is_item and (rule is None or rule.family != "movement"):
        return None
    if len(node.all_input_nodes) != 1 or node.args[0] is not node.all_input_nodes[0]:
        return None  # a size or an index from elsewhere, or several tensors
    inner = _moved_parameter(rewriter, node.args[0])
    if inner is None:
        return None
    op: Any = node.target
    with torch.no_grad():
        return inner[0], op(inner[1], *node.args[1:], **node.kwargs)


def _from_product(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    if not is_call(node, *_PRODUCTS):
        return False
    x, w = node.args[:2]
    weight = _transposed(rewriter, w, node)
    if weight is None:
        refuse(node, "its second factor is no parameter of two dimensions")
        return False
    if len(sizes(x)) < 2:
        refuse(node, "its first factor is a vector")
        return False
    why = "a product with a parameter is a linear"
    rewriter.replace(node, rewriter.call(aten.linear.default, (x, weight), at=node, why=why))
    return True


def _from_addmm(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    if not is_call(node, aten.addmm.default):
        return False
    bias, x, w = node.args[:3]
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        refuse(node, "it scales its terms (alpha, beta)")
        return False
    if sizes(bias) != sizes(node)[-1:]:
        refuse(node, "what it adds is no bias vector")
        return False
    weight = _transposed(rewriter, w, node)
    if weight is None:
        refuse(node, "its second factor is no parameter")
        return False
    why = "addmm with a parameter is a linear"
    rewriter.replace(node, rewriter.call(aten.linear.default, (x, weight, bias), at=node, why=why))
    return True


def _transposed(rewriter: Rewriter, w: Any, at: torch.fx.Node) -> torch.fx.Node | None:
    """A node for wᵀ [N, K], where ``w`` [K, N] is a parameter or the transpose of one."""
    moved = _moved_parameter(rewriter, w)
    if moved is None or moved[1].ndim != 2:
        return None
    target, tensor = moved
    if is_call(w, aten.permute.default, aten.transpose.int, aten.t.default) and _swaps(w):
        inner = w.args[0]
        if rewriter.tensor(inner) is not None:
            return inner
    for user in w.users:
        if is_call(user, aten.linear.default) and user.args[1] is w:
            return None  # it is read as [N, K] too; two copies would cost more than they give
    for existing in rewriter.graph.nodes:
        if existing.meta.get(_TRANSPOSE_OF) == w.name:
            return existing
        if existing is at:
            break
    turned = rewriter.constant(
        tensor.detach().t().contiguous(), f"{target}_t", at=at, why=f"{target} as [N, K]"
    )
    turned.meta[_TRANSPOSE_OF] = w.name
    return turned


def _swaps(node: torch.fx.Node) -> bool:
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [dim % 2 for dim in dims] == [1, 0]
    if node.target is aten.transpose.int:
        first, second = node.args[1:3]
        return isinstance(first, int) and isinstance(second, int) and first % 2 != second % 2
    return True


def _lift_view(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    """A linear acts on the last axis: regrouping the leading ones can wait until after it."""
    if not is_call(node, aten.linear.default) or not is_call(node.args[0], aten.view.default):
        return False
    view: Any = node.args[0]
    source = view.args[0]
    before, after = sizes(source), sizes(view)
    if len(before) < 2 or match_axes(before, after)[-1] != len(before) - 1:
        refuse(node, "the view before it changes the last axis")
        return False
    inner = rewriter.call(
        aten.linear.default, (source, *node.args[1:]), at=node, why="views wait until after it"
    )
    shape = [*view.args[1][:-1], sizes(node)[-1]]
    regrouped = rewriter.call(aten.view.default, (inner, shape), at=node, why="the view, after it")
    rewriter.replace(node, regrouped)
    for user in list(regrouped.users):
        # a view of a view needs only the outer one
        if is_call(user, aten.view.default):
            user.replace_input_with(regrouped, inner)
    return True


def _absorb_bias(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return False
    for product, bias in (node.args[:2], node.args[1::-1]):
        if not is_call(product, aten.linear.default) or rewriter.tensor(bias) is None:
            continue
        linear: Any = product
        if argument(linear, 2, "bias") is not None or len(linear.users) != 1:
            refuse(node, "the linear has a bias or another reader")
            continue
        if sizes(bias) != sizes(node)[-1:]:
            refuse(node, "what is added is no bias vector")
            continue
        args = (*linear.args[:2], bias)
        why = "a sum with a parameter is a bias"
        rewriter.replace(node, rewriter.call(aten.linear.default, args, at=node, why=why))
        return True
    return False


def _from_index_select(rewriter: Rewriter, node: torch.fx.Node) -> bool:
    if not is_call(node, aten.index_select.default) or node.args[1] != 0:
        return False
    table, _, ids = node.args[:3]
    weight = rewriter.tensor(table)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        refuse(node, "what it selects from is no table")
        return False
    why = "rows of a parameter by index are an embedding"
    rewriter.replace(node, rewriter.call(aten.embedding.default, (table, ids), at=node, why=why))
    return True
