"""How an operator lets a transform of channels pass, and the registry of it.

A value ``v`` in a region is replaced by ``T(v)``, channel by channel. For each operator that reads
or makes such a value, its rule says which of its other values must then be replaced too, for the
function to stay the same; or refuses, with a reason. A parameter that must be replaced *absorbs*
the transform. The kinds of transforms:

    scale     v·d, d > 0                            relu, max pooling, products let it pass
    sign      v·d, d ≠ 0 of any sign                products and sums let it pass
    permute   v[…, p]                               whatever treats channels alike lets it pass
    rotate    v·Q, Q orthogonal, in blocks          sums, and norms without a gain, let it pass
    centre    v − mean(v), no inverse               sums let it pass; a layer_norm absorbs it
    shift     v − z                                 movement, attention's values let it pass

What a contraction sums over must carry the inverse transpose on its other operand (``inverse``):
(v·T)·(w·T⁻ᵀ)ᵀ = v·wᵀ. For rotations and permutations that is T itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any, Literal, Protocol, get_args

import torch
import torch.fx

from scaleprop.errors import ConfigError
from scaleprop.rules.channels.layouts import Layout, Refused, crosses

Kind = Literal["scale", "sign", "permute", "rotate", "centre", "shift"]
Slot = int | tuple[int, int]  # where an operand stands: args[i], or args[i][j]

DIAGONAL: tuple[Kind, ...] = ("scale", "sign")
MONOMIAL: tuple[Kind, ...] = (*DIAGONAL, "permute")
INVERTIBLE: tuple[Kind, ...] = (*MONOMIAL, "rotate")
LINEAR: tuple[Kind, ...] = (*INVERTIBLE, "centre")
MIXING: tuple[Kind, ...] = ("permute", "rotate", "centre")
EVERY: tuple[Kind, ...] = get_args(Kind)


class Flow(Protocol):
    """What a rule sees of one call, and how it answers.

    node: the call. kind: of the transform. block: how many channels it mixes with each other.
    out: the layout that the call's value carries, if any.
    """

    @property
    def node(self) -> torch.fx.Node: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def block(self) -> int: ...
    @property
    def out(self) -> Layout | None: ...

    def of(self, value: Any) -> Layout | None:
        """The layout that an operand carries; None where it carries none."""
        ...

    def result(self, layout: Layout) -> None:
        """The call's value must carry ``layout``."""
        ...

    def carry(self, value: Any, layout: Layout, slot: Slot, missing: float | None = None,
              side: int = 0) -> None:
        """The operand ``value`` in ``slot`` must carry ``layout``; a parameter absorbs it.

        missing: what an operand that is not given stands for, everywhere (a norm's weight: 1).
        side: a weight that takes one transform of what is read (1) and another of what is made (0)
        takes up both, one after the other.
        """
        ...

    def is_parameter(self, value: Any) -> bool:
        """Whether ``value`` absorbs: a parameter or buffer, or what is made of them alone."""
        ...

    def choose(self, count: int) -> int:
        """Which of several equally right answers to give: the solver tries them in turn."""
        ...

    def counter(self, layout: Layout) -> None:
        """A shift of operand 0 is undone in the sum that this contraction makes."""
        ...


ChannelRule = Callable[[Flow], None]
_RULES: dict[Any, ChannelRule] = {}
_PARTS: dict[Any, ChannelRule] = {}  # by the operator that makes a tuple: reading an item of it


def channels(*ops: Any, parts: bool = False) -> Callable[[ChannelRule], ChannelRule]:
    """Register the rule of ``ops``; with ``parts`` that of reading one item of what they make.

    Raises:
        ConfigError: where an operator already has one.
    """
    table = _PARTS if parts else _RULES

    def add(rule: ChannelRule) -> ChannelRule:
        for op in ops:
            if op in table:
                raise ConfigError(f"{op} already has a rule of channels")
            table[op] = rule
        return rule

    return add


def channel_rule_for(node: torch.fx.Node) -> ChannelRule | None:
    """The rule of a call; None where transforms cannot pass it."""
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return _PARTS.get(source.target)
    return _RULES.get(node.target) or _RULES.get(_family(node.target))


def _family(op: Any) -> str:
    """Libraries register operators of their own for products of groups of rows."""
    name = op._schema.name if isinstance(op, torch._ops.OpOverload) else ""  # pyright: ignore[reportPrivateUsage]
    return GROUPED if GROUPED in name else name


GROUPED = "grouped_mm"


def only(flow: Flow, kinds: Collection[Kind], why: str) -> None:
    """Raise ``Refused`` unless the transform is one of ``kinds``."""
    if flow.kind not in kinds:
        raise Refused(why)


def apart(flow: Flow, layout: Layout, axes: Collection[int], why: str) -> None:
    """Raise ``Refused`` where channels with different places along ``axes`` are mixed."""
    if flow.kind in MIXING and crosses(layout, flow.block, tuple(axes)):
        raise Refused(why)


def with_rules() -> tuple[Any, ...]:
    """Every operator that has a rule."""
    return (*_RULES, *_PARTS)
