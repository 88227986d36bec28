"""What scaleprop knows of an operator, and the registry of it.

A ``Rule`` answers questions; passes ask them and know no operator by name. An operator without a
rule is never touched: its tensors stay in plain high precision, and ``coverage`` lists it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.fx

from scaleprop._torch_compat import operator_names
from scaleprop.errors import ConfigError
from scaleprop.rules.moments import moments_rule_for
from scaleprop.rules.moments_pointwise import SAME, is_pointwise

OperandRole = Literal["activation", "weight", "bias", "gradient"]
ContractionKind = Literal["linear", "conv", "embedding", "matmul", "attention"]

# output axis → the axis of argument 0 that it is; None for an axis that is new, merged or computed
AxisMap = tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Homogeneity:
    """How a positive scalar scale on each input appears at the output.

    ``f(s₀·x₀, s₁·x₁, …) = Π sᵢ^degree(i) · f(x₀, x₁, …)`` for all s > 0.

    degrees: argument index → degree. ``relu``: {0: 1}; ``mul``: {0: 1, 1: 1}; ``div``:
        {0: 1, 1: −1}; a norm: {0: 0}, the scale is killed. A Python number has no scale.
    follows: arguments that must carry the output's scale for the equation to hold: the bias of a
        linear, both terms of a sum, every part of a concatenation.
    outputs: the degrees of each output, where there are several and they differ.
    exact: False where the equation holds only up to a constant that does not scale (a norm's ε).

    An argument in neither must be unscaled. Outputs that are no floats have no scale.
    """

    degrees: Mapping[int, int] = dataclasses.field(default_factory=dict)
    follows: tuple[int, ...] = ()
    outputs: tuple[Mapping[int, int], ...] = ()
    exact: bool = True

    def of_output(self, index: int) -> Mapping[int, int]:
        """The degrees of one output."""
        return self.outputs[index] if self.outputs else self.degrees

    @property
    def scaled(self) -> frozenset[int]:
        """The arguments that may carry a scale of their own."""
        return frozenset(self.degrees).union(*self.outputs)


# some operators are homogeneous for some constants only: a clamp at zero
Law = Homogeneity | Callable[[torch.fx.Node], Homogeneity | None]


@dataclasses.dataclass(frozen=True)
class Operand:
    """One operand of a contraction, or of what makes a contraction's gradients.

    argument: its position among the node's arguments. axes: the axes that are summed over,
        counted from the end; none for a bias, nor where gradients are made: each sums over others.
    """

    argument: int
    role: OperandRole
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A sum of products: what low-precision hardware is for.

    axes_of: node → each operand's axes, where they depend on the call.
    """

    kind: ContractionKind
    operands: tuple[Operand, ...]
    axes_of: Callable[[torch.fx.Node], tuple[tuple[int, ...], ...]] | None = None

    def at(self, node: torch.fx.Node) -> Contraction:
        """The same with the axes of one call."""
        if self.axes_of is None:
            return self
        return Contraction(self.kind, tuple(
            dataclasses.replace(operand, axes=axes)
            for operand, axes in zip(self.operands, self.axes_of(node), strict=True)))

    def operand(self, role: OperandRole) -> Operand | None:
        """The first operand in ``role``."""
        return next((operand for operand in self.operands if operand.role == role), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The algebra of one ATen operator.

    family: the heading under which ``coverage`` lists it.
    homogeneity: None where the operator needs its inputs unscaled (``exp``, ``gelu``); see ``law``.
    axes: node → ``AxisMap`` for argument 0; None where no axis survives.
    moves: the output holds exactly the elements of argument 0, each at least once, in some order:
        whatever a per-tensor scale is found from, is found from either.
    contraction: what is contracted with what; None where nothing is. See ``contraction_of``.
    gradient_of: for an operator that makes the gradients of a contraction: of which kind, and from
        what. They are several sums of products in one, so ``contraction`` is None.
    high: why its operands stay in high precision, for the report; "" where nobody would ask.
    bounded: the size of what comes out does not follow argument 0's: a sigmoid, a softmax, a norm
        (whose weight sets it).
    degree: of argument 0, where it is no whole number: the root of a scale need not be a power of
        two, so ``homogeneity`` is None.
    """

    op: torch._ops.OpOverload  # pyright: ignore[reportPrivateUsage]
    family: str
    homogeneity: Law | None = None
    axes: Callable[[torch.fx.Node], AxisMap] | None = None
    moves: bool = False
    contraction: Contraction | None = None
    gradient_of: Contraction | None = None
    high: str = ""
    bounded: bool = False
    degree: float | None = None

    def law(self, node: torch.fx.Node) -> Homogeneity | None:
        """The homogeneity of one call; None where it needs its inputs unscaled."""
        return self.homogeneity(node) if callable(self.homogeneity) else self.homogeneity


_RULES: dict[Any, Rule] = {}


def register(rule: Rule) -> Rule:
    """Add a rule.

    Raises:
        ConfigError: where the operator already has one.
    """
    if rule.op in _RULES:
        raise ConfigError(f"{rule.op} already has a rule, in family {_RULES[rule.op].family!r}")
    _RULES[rule.op] = rule
    return rule


def rule_for(op: Any) -> Rule | None:
    """The rule of an operator, or None: then it is left alone and reported."""
    return _RULES.get(op)


def answers_moments(op: Any) -> bool:
    """Whether mean, RMS and sparsity of what ``op`` makes follow from those of what it reads."""
    rule = rule_for(op)
    moves = rule is not None and rule.moves
    return moves or op in SAME or is_pointwise(op) or moments_rule_for(op) is not None


def contraction_of(node: torch.fx.Node) -> Contraction | None:
    """What ``node`` contracts; None for everything that is not a contraction."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    return rule.contraction.at(node) if rule is not None and rule.contraction else None


def contraction_behind(node: torch.fx.Node) -> Contraction | None:
    """The same, also for what makes the gradients of a contraction: several sums of products."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    return contraction_of(node) or (rule.gradient_of if rule is not None else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """What the registry answers for one operator.

    family: None for a gap: an operator without a rule.
    homogeneity: as ``formula`` writes it; "" where the inputs must be unscaled.
    axes: whether some axes of argument 0 are known to survive.
    moves, bounded, degree, high: as in ``Rule``. moments: see ``answers_moments``.
    contraction: its kind, or ``gradients of`` it.
    count: how often a program uses it.
    """

    op: str
    family: str | None
    homogeneity: str = ""
    axes: bool = False
    moves: bool = False
    moments: bool = False
    bounded: bool = False
    degree: float | None = None
    contraction: str | None = None
    high: str = ""
    count: int = 0


def coverage(program_ops: Iterable[Any] = (), also: Iterable[Any] = ()) -> tuple[Coverage, ...]:
    """One line per operator, gaps included: those in the registry, and those given without a rule.

    program_ops: operators of a program, with repetition, e.g. ``(n.target for n in graph.nodes)``.
    also: operators to list that no program need use.
    """
    counts = Counter(program_ops)
    lines = [_line(op, counts[op]) for op in dict.fromkeys([*_RULES, *counts, *also])]
    return tuple(sorted(lines, key=lambda line: (line.family or "~", line.op)))


def _line(op: Any, count: int) -> Coverage:
    rule = rule_for(op)
    if rule is None:
        return Coverage(op=str(op), family=None, moments=answers_moments(op), count=count)
    return Coverage(
        op=str(op),
        family=rule.family,
        homogeneity=formula(rule.homogeneity),
        axes=rule.axes is not None,
        moves=rule.moves,
        moments=answers_moments(op),
        bounded=rule.bounded,
        degree=rule.degree,
        contraction=rule.contraction.kind if rule.contraction else
        f"gradients of {rule.gradient_of.kind}" if rule.gradient_of else None,
        high=rule.high,
        count=count,
    )


def formula(law: Law | None) -> str:
    """``x0^1*x1^1, follows x2``: the scale that comes out, from those of the arguments.

    ``1`` where nothing may have a scale, and nothing has; "" where there is no equation.
    """
    if law is None:
        return ""
    if callable(law):
        return "depends on constants"
    terms = [
        "; ".join(f"y{index}: {_product(degrees)}" for index, degrees in enumerate(law.outputs))
        or _product(law.degrees),
        "follows " + " and ".join(f"x{place}" for place in law.follows) if law.follows else "",
        "" if law.exact else "up to a constant",
    ]
    return ", ".join(filter(None, terms)) or "1"


def _product(degrees: Mapping[int, int]) -> str:
    return "*".join(f"x{place}^{degree}" for place, degree in degrees.items())


def core_operators() -> tuple[Any, ...]:
    """Core ATen: what every model's graph can be brought to. Those that write are never in one."""
    found: list[Any] = []
    for name in operator_names():
        namespace, _, packet = name.partition("::")
        if namespace == "aten":
            packet, _, overload = packet.partition(".")
            found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return tuple(op for op in found if torch.Tag.core in op.tags and not op._schema.is_mutable)
