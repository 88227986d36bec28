"""Residual streams, norms and attention in a forward graph, told from its operators alone."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.fx

from scaleprop.rules import contraction_behind, contraction_of, rule_for
from scaleprop.rules.moments_pointwise import is_pointwise

aten: Any = torch.ops.aten

Placement = Literal["pre", "post", "pre and branch", "branch", "none"]
_NEAR = 10  # operators between a value and the root of its own mean square, in a norm in parts
_THINNED = frozenset((aten.native_dropout.default, aten.dropout.default))


@dataclasses.dataclass(frozen=True)
class Residual:
    """A sum of a value with what a parameterised branch makes of it.

    total, skip, branch: the sum and its two terms. placement: where norms are: ``pre``: the branch
    begins with one; ``branch``: it ends with one; ``post``: the sum is read by one only.
    """

    total: torch.fx.Node
    skip: torch.fx.Node
    branch: torch.fx.Node
    placement: Placement


def factors(node: torch.fx.Node) -> list[torch.fx.Node]:
    """What ``node`` multiplies and sums, biases left out: of a contraction, or of what makes the
    gradients of one. A lookup multiplies nothing."""
    contraction = contraction_behind(node)
    if contraction is None or contraction.kind == "embedding":
        return []
    found = [node.args[operand.argument] for operand in contraction.operands
             if operand.role != "bias" and operand.argument < len(node.args)]
    return [factor for factor in found if isinstance(factor, torch.fx.Node)]


class Structure:
    """What reads what in the forward part of a graph."""

    def __init__(
        self, graph: torch.fx.Graph, parameters: Collection[torch.fx.Node],
        backward: Collection[torch.fx.Node],
    ) -> None:
        self.forward = [node for node in graph.nodes if node not in backward]
        self.parameters = parameters
        self.order = {node: place for place, node in enumerate(self.forward)}
        self._backward = backward

    def residuals(self) -> list[Residual]:
        """Every residual sum, in order: two paths from one value, one of them through a product
        with a parameter. Mask and position sums, and sums of powers, are none."""
        found: list[Residual] = []
        for node in self.forward:
            if node.target is not aten.add.Tensor or not _same_shapes(node):
                continue
            left, right = node.args[:2]
            for skip, branch in ((left, right), (right, left)):
                root = self.passed(skip)
                if self._reaches(branch, root):  # type: ignore[arg-type]
                    found.append(Residual(node, skip, branch, self._placement(node, root, branch)))  # type: ignore[arg-type]
                    break
        return found

    def normed(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """What ``node`` is the norm of, gain and bias included; None where it is none."""
        for _ in range(_NEAR):
            source: Any = node.args[0] if node.args else None
            rule = rule_for(node.target)
            if rule is not None and rule.family == "norm":
                return source
            if isinstance(source, torch.fx.Node) and _is_norm(source):
                return source.args[0]  # type: ignore[return-value]
            factors = [arg for arg in node.args[:2] if isinstance(arg, torch.fx.Node)]
            for value, factor in (factors, factors[::-1]) if len(factors) == 2 else ():
                if self._is_inverse_deviation(factor, value):
                    return self._uncast(value)
            inner = [arg for arg in factors if self._parameter(arg) is None]
            affine = node.target in (aten.mul.Tensor, aten.add.Tensor) and len(inner) == 1 \
                and len(factors) == 2
            if not affine and not _passes(node):
                return None
            node = inner[0]
        return None

    def attention_weights(self) -> list[torch.fx.Node]:
        """Softmaxes that a matrix product averages with."""
        return [node for node in self.forward if is_softmax(node) and self._is_averaged(node)]

    def attentions(self) -> list[torch.fx.Node]:
        """Whole attention operators, whose weights are nobody's."""
        return [node for node in self.forward
                if (c := contraction_of(node)) is not None and c.kind == "attention"]

    def _is_averaged(self, node: torch.fx.Node) -> bool:
        for user in node.users:
            if user in self._backward:
                continue
            contraction = contraction_of(user)
            if contraction is not None and contraction.kind == "matmul":
                return True
            if (_passes(user) or user.target in _THINNED or _is_item(user)) and \
                    self._is_averaged(user):
                return True
        return False

    def passed(self, node: Any) -> Any:
        """What ``node`` is, moves, casts, dropout and multiplications by numbers undone."""
        while isinstance(node, torch.fx.Node) and node.args:
            alone = len(node.all_input_nodes) == 1
            scaled = node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor) and alone
            if not (_passes(node) or scaled or node.target in _THINNED or _dropped(node)):
                break
            node = node.args[0]
        return node

    def _reaches(self, branch: torch.fx.Node, root: Any) -> bool:
        """Whether a path leads from ``root`` to ``branch`` through a product with a parameter."""
        if root not in self.order or root is branch:
            return False
        seen: set[tuple[torch.fx.Node, bool]] = set()
        ahead = [(branch, False)]
        while ahead:
            node, learned = ahead.pop()
            if node is root:
                if learned:
                    return True
                continue
            if (node, learned) in seen or self.order.get(node, -1) <= self.order[root]:
                continue
            seen.add((node, learned))
            learned = learned or self._is_layer(node)
            ahead += [(source, learned) for source in node.all_input_nodes]
        return False

    def _is_layer(self, node: torch.fx.Node) -> bool:
        """Whether ``node`` multiplies an activation with a parameter, and sums."""
        return any(self._parameter(factor) is not None for factor in factors(node))

    def _parameter(self, node: torch.fx.Node) -> torch.fx.Node | None:
        """The parameter that ``node`` is, moved or cast."""
        while node not in self.parameters and _passes(node):
            node = node.args[0]  # type: ignore[assignment]
        return node if node in self.parameters else None

    def _placement(
        self, total: torch.fx.Node, root: torch.fx.Node, branch: torch.fx.Node
    ) -> Placement:
        ends = self.normed(self.passed(branch)) is not None
        begins = self._begins_with_norm(root, branch)
        if begins:
            return "pre and branch" if ends else "pre"
        if ends:
            return "branch"
        readers = [user for user in total.users if user not in self._backward]
        return "post" if readers and all(self._leads_to_norm(user, total) for user in readers) \
            else "none"

    def _begins_with_norm(self, root: torch.fx.Node, branch: torch.fx.Node) -> bool:
        """Whether each way from ``root`` into ``branch`` is through a norm."""
        inside = self._between(root, branch)
        entries = [(user, root) for user in root.users if user in inside]
        for user, value in entries:  # grows
            if _passes(user) or user.target in _THINNED or _dropped(user):
                entries += [(reader, user) for reader in user.users if reader in inside]
            elif not self._leads_to_norm(user, value):
                return False
        return bool(entries)

    def _between(self, root: torch.fx.Node, branch: torch.fx.Node) -> set[torch.fx.Node]:
        """Every node on a way from ``root`` to ``branch``."""
        back: set[torch.fx.Node] = set()
        ahead = [branch]
        while ahead:
            node = ahead.pop()
            if node in back or self.order.get(node, -1) <= self.order[root]:
                continue
            back.add(node)
            ahead += node.all_input_nodes
        return back

    def _leads_to_norm(self, user: torch.fx.Node, value: torch.fx.Node) -> bool:
        """Whether ``user`` is, or is a part of, a norm of ``value``."""
        if _is_norm(user):
            return True
        near, ahead = {user}, [user]
        for _ in range(_NEAR):
            ahead = [n for node in ahead for n in node.users
                     if n not in near and n not in self._backward]
            near.update(ahead)
        found = [self.normed(node) for node in near if node.target is aten.mul.Tensor]
        return any(n is not None and self._uncast(n) is self._uncast(value) for n in found)

    def _is_inverse_deviation(self, factor: torch.fx.Node, value: torch.fx.Node) -> bool:
        """Whether ``factor`` is 1/√(mean of value²): a root of what ``value`` alone makes."""
        value, node, rooted = self._uncast(value), factor, False
        for _ in range(_NEAR):
            if node is value:
                return rooted
            rule = rule_for(node.target)
            rooted = rooted or (rule is not None and rule.degree == -0.5)
            sources = [self._uncast(s) for s in node.all_input_nodes]
            if len(set(sources)) != 1:
                return False
            node = sources[0]
        return False

    def _uncast(self, node: torch.fx.Node) -> torch.fx.Node:
        while _passes(node):
            node = node.args[0]  # type: ignore[assignment]
        return node


def stream(found: Sequence[Residual], structure: Structure) -> list[list[Residual]]:
    """Residual sums in chains: each one's skip is the sum before it, or a norm of it."""
    chains: list[list[Residual]] = []
    ends: dict[torch.fx.Node, list[Residual]] = {}
    for residual in found:
        skip = _unwound(structure, residual.skip, ends)
        source = structure.normed(skip) if skip not in ends else skip
        chain = ends.pop(source, None) if source is not None else None
        if chain is None:
            chain = []
            chains.append(chain)
        chain.append(residual)
        ends[residual.total] = chain
    return chains


def _unwound(
    structure: Structure, skip: torch.fx.Node, ends: Mapping[torch.fx.Node, Any]
) -> torch.fx.Node:
    """The value behind ``skip``, functions of it alone undone where they lead to a sum in ``ends``:
    the activation after a sum."""
    start = node = structure.passed(skip)
    while node not in ends and len(node.all_input_nodes) == 1 and is_pointwise(node.target):
        node = structure.passed(node.all_input_nodes[0])
    return node if node in ends else start


def _same_shapes(node: torch.fx.Node) -> bool:
    values = [arg.meta.get("val") for arg in node.args[:2] if isinstance(arg, torch.fx.Node)]
    shapes = [tuple(v.shape) for v in values
              if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return len(shapes) == 2 and shapes[0] == shapes[1] and len(shapes[0]) > 1


def _passes(node: torch.fx.Node) -> bool:
    """Whether ``node`` holds its argument's elements, moved or in another float type."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], torch.fx.Node):
        return False
    rule = rule_for(node.target)
    return rule is not None and (rule.moves or rule.family == "cast")


def _is_item(node: torch.fx.Node) -> bool:
    return node.target is operator.getitem


def _dropped(node: torch.fx.Node) -> bool:
    source: Any = node.args[0] if node.args else None
    return _is_item(node) and isinstance(source, torch.fx.Node) and source.target in _THINNED


def _is_norm(node: torch.fx.Node) -> bool:
    rule = rule_for(node.target) if node.op == "call_function" else None
    return rule is not None and rule.family == "norm"


def is_softmax(node: torch.fx.Node) -> bool:
    """Whether ``node`` holds weights of rows, or their logarithms: as many as there are scores."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    if rule is None or rule.family != "softmax":
        return False
    scores: Any = node.args[0]
    value, given = node.meta.get("val"), scores.meta.get("val")
    return value is None or (isinstance(value, torch.Tensor) and value.shape == given.shape)
