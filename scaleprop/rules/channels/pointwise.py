"""Operators on each element: which transforms they let pass follows from their homogeneity."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop.rules.base import rule_for
from scaleprop.rules.channels.base import (
    DIAGONAL,
    LINEAR,
    Flow,
    apart,
    channels,
    only,
)
from scaleprop.rules.channels.layouts import Layout, Refused, sizes_of

aten: Any = torch.ops.aten


def one_operand(flow: Flow) -> None:
    """f(x), element by element: a permutation passes, a positive scale where f(d·x) = d·f(x)."""
    node = flow.node
    rule = rule_for(node.target)
    law = rule.law(node) if rule is not None else None
    homogeneous = law is not None and dict(law.degrees) == {0: 1}
    name = str(node.target)
    only(flow, ("scale", "permute") if homogeneous else ("permute",),
         f"{name} treats each value for itself, not as a sum" if homogeneous
         else f"{name} is not homogeneous")  # fmt: skip
    _through(flow)


def _through(flow: Flow) -> None:
    x: Any = flow.node.args[0]
    if any(value is not x and sizes_of(value) for value in flow.node.all_input_nodes):
        raise Refused("it reads several tensors")
    if (layout := flow.of(x)) is not None:
        flow.result(layout)
    if flow.out is not None:
        flow.carry(x, flow.out, 0)


@channels(aten.neg.default)
def negated(flow: Flow) -> None:
    """−x is linear."""
    only(flow, LINEAR, "a shift changes its sign")
    _through(flow)


def _operands(node: torch.fx.Node, count: int = 2) -> list[tuple[Any, int]]:
    first = 1 if node.target is aten.where.self else 0
    return [(node.args[place], place) for place in range(first, first + count)]


def _lifted(flow: Flow, value: Any, layout: Layout) -> Layout:
    """An operand's layout in the output's axes; an axis along which it is repeated stays off."""
    shift = len(sizes_of(flow.node)) - len(sizes_of(value))
    lifted = layout.at([axis + shift for axis in layout.axes])
    out = sizes_of(flow.node)
    if any(out[axis] != size for axis, size in zip(lifted.axes, lifted.codes.shape, strict=True)):
        raise Refused("an operand is repeated over the channels")
    return lifted


def spans(flow: Flow, value: Any, layout: Layout) -> bool:
    """Whether ``value`` has an element of its own for every position of the output's layout."""
    sizes, out = sizes_of(value), sizes_of(flow.node)
    shift = len(out) - len(sizes)
    return all(axis >= shift and sizes[axis - shift] == out[axis] for axis in layout.axes)


def _lowered(flow: Flow, value: Any, layout: Layout) -> Layout:
    """The output's layout in an operand's axes."""
    if not spans(flow, value, layout):
        raise Refused("an operand is the same for all channels")
    shift = len(sizes_of(flow.node)) - len(sizes_of(value))
    return layout.at([axis - shift for axis in layout.axes])


def _is_number(value: Any) -> bool:
    return not isinstance(value, torch.fx.Node) or not isinstance(
        value.meta.get("val"), torch.Tensor)


@channels(aten.add.Tensor, aten.sub.Tensor, aten.where.self, aten.add.Scalar, aten.sub.Scalar)
def added(flow: Flow) -> None:
    """a + b, a − b, where(mask, a, b): both terms carry what the sum does."""
    node = flow.node
    if node.kwargs.get("alpha", 1) != 1:
        raise Refused("its second term is scaled")
    terms = _operands(node)
    if node.target is aten.where.self and flow.of(node.args[0]) is not None:
        raise Refused("its mask carries channels")
    if flow.kind == "shift" and node.target is not aten.where.self:
        _shifted_sum(flow, terms)
        return
    known = [(value, flow.of(value)) for value, _ in terms]
    for value, _ in terms:
        if (layout := flow.of(value)) is not None:
            flow.result(_lifted(flow, value, layout))
    layouts = [_lifted(flow, value, layout) for value, layout in known if layout is not None]
    if flow.out is not None:
        layouts.append(flow.out)
    for layout in layouts:
        for value, slot in terms:
            if _is_number(value):
                if value != 0:
                    raise Refused(f"the number {value} is added to every channel")
            else:
                _carry_term(flow, value, layout, slot)
        if node.target is aten.where.self:
            _shared(flow, node.args[0], layout, "channels that are mixed have masks of their own")


def _carry_term(flow: Flow, value: Any, layout: Layout, slot: int) -> None:
    if spans(flow, value, layout):
        flow.carry(value, _lowered(flow, value, layout), slot)
    elif flow.kind == "shift" or not (
        isinstance(value, torch.fx.Node) and value.target is aten.scalar_tensor.default
        and value.args[0] == 0
    ):  # fmt: skip
        raise Refused("a term is the same for all channels")


def _shared(flow: Flow, value: Any, layout: Layout, why: str) -> None:
    """``value`` must be the same for all channels that are mixed with each other."""
    sizes = sizes_of(value)
    shift = len(sizes_of(flow.node)) - len(sizes)
    varying = [axis for axis in layout.axes if axis >= shift and sizes[axis - shift] != 1]
    apart(flow, layout, varying, why)


def _shifted_sum(flow: Flow, terms: list[tuple[Any, int]]) -> None:
    """One term carries the shift of the sum; of a difference, the first."""
    node = flow.node
    subtracts = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    known = [(value, slot) for value, slot in terms
             if not _is_number(value) and flow.of(value) is not None]  # fmt: skip
    if len(known) > 1 or (known and known[0][1] == 1 and subtracts):
        raise Refused("both terms are shifted")
    if known:
        layout = flow.of(known[0][0])
        assert layout is not None
        flow.result(_lifted(flow, known[0][0], layout))
        return
    if flow.out is None:
        return
    able = [(value, slot) for value, slot in terms[:1 if subtracts else 2]
            if not _is_number(value) and spans(flow, value, flow.out)]  # fmt: skip
    if not able:
        raise Refused("no term has an element for every channel")
    able.sort(key=lambda term: not flow.is_parameter(term[0]))
    value, slot = able[flow.choose(len(able))]
    flow.carry(value, _lowered(flow, value, flow.out), slot)


@channels(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
def multiplied(flow: Flow) -> None:
    """a·b, a/b: a scale of the product is one factor's; what is linear passes a shared factor."""
    divides = flow.node.target in (aten.div.Tensor, aten.div.Scalar)
    factors = _operands(flow.node)
    numbers = [value for value, _ in factors if _is_number(value)]
    if numbers:
        only(flow, LINEAR, "a shift would be multiplied")
        if divides and _is_number(factors[0][0]):
            raise Refused("a number is divided by it")
        value, slot = next(item for item in factors if not _is_number(item[0]))
        _pass_on(flow, value, slot)
        return
    layouts = [flow.of(value) for value, _ in factors]
    if factors[0][0] is factors[1][0]:
        only(flow, ("permute",), "it is squared")
    known = [place for place in (0, 1) if layouts[place] is not None]
    reference = flow.out
    if reference is None:
        first = layouts[known[0]]
        assert first is not None
        reference = _lifted(flow, factors[known[0]][0], first)
    full = [spans(flow, value, reference) for value, _ in factors]
    if flow.kind == "permute" and all(full):
        _carry_all(flow, factors, reference)
    elif all(full):
        only(flow, DIAGONAL, "it is multiplied channel by channel")
        _divide_scale(flow, factors, layouts, divides)
    else:
        only(flow, LINEAR, "a shift would be multiplied")
        if not any(full):
            raise Refused("channels lie along axes of both factors")
        place = full.index(True)
        if layouts[1 - place] is not None:
            raise Refused("both factors carry channels, along different axes")
        if divides and place == 1:
            raise Refused("something shared by all channels is divided by it")
        _shared(flow, factors[1 - place][0], reference, "channels that are mixed have own factors")
        _pass_on(flow, *factors[place])


def _pass_on(flow: Flow, value: Any, slot: int) -> None:
    """Linear in ``value``."""
    if (layout := flow.of(value)) is not None:
        flow.result(_lifted(flow, value, layout))
    if flow.out is not None:
        flow.carry(value, _lowered(flow, value, flow.out), slot)


def _carry_all(flow: Flow, operands: list[tuple[Any, int]], layout: Layout) -> None:
    flow.result(layout)
    for value, slot in operands:
        flow.carry(value, _lowered(flow, value, layout), slot)


def _divide_scale(
    flow: Flow, factors: list[tuple[Any, int]], layouts: list[Layout | None], divides: bool
) -> None:
    """Of product and factors exactly two carry the scale: log d_y = log d_a + log d_b."""
    out = flow.out
    lifted = [None if layout is None else _lifted(flow, factors[place][0], layout)
              for place, layout in enumerate(layouts)]  # fmt: skip
    if all(layout is not None for layout in lifted):
        raise Refused("both factors carry a scale")
    place = 0 if lifted[0] is not None else 1
    given = lifted[place]
    if given is not None:
        own = given.inverse() if divides and place == 1 else given
        if out is not None:
            flow.result(own)
            return
        other, slot = factors[1 - place]
        # the factor that is left takes the inverse, or the product the scale
        absorbs = flow.is_parameter(other)
        if flow.choose(2) == (0 if absorbs else 1):
            turned = own if divides and place == 0 else own.inverse()
            flow.carry(other, _lowered(flow, other, turned), slot)
        else:
            flow.result(own)
        return
    assert out is not None
    order = sorted((0, 1), key=lambda index: not flow.is_parameter(factors[index][0]))
    value, slot = factors[order[flow.choose(2)]]
    turned = out.inverse() if divides and slot == 1 else out
    flow.carry(value, _lowered(flow, value, turned), slot)


def several_operands(flow: Flow) -> None:
    """f(a, b, …), element by element: a permutation passes where all are permuted alike."""
    only(flow, ("permute",), f"{flow.node.target} is not homogeneous in several values")
    operands = [(value, place) for place, value in enumerate(flow.node.args)
                if not _is_number(value)]  # fmt: skip
    layouts = [_lifted(flow, value, layout) for value, _ in operands
               if (layout := flow.of(value)) is not None]  # fmt: skip
    for layout in [*layouts, *([flow.out] if flow.out is not None else [])]:
        flow.result(layout)
        for value, slot in operands:
            if spans(flow, value, layout):
                flow.carry(value, _lowered(flow, value, layout), slot)
            elif any(sizes_of(value)[a - len(sizes_of(flow.node)) + len(sizes_of(value))] != 1
                     for a in layout.axes
                     if a >= len(sizes_of(flow.node)) - len(sizes_of(value))):  # fmt: skip
                raise Refused("an operand is repeated over some of the channels")


def pointwise(flow: Flow) -> None:
    """Whatever PyTorch tags as pointwise, and has no rule of its own."""
    tensors = [value for value in flow.node.all_input_nodes if sizes_of(value)]
    (one_operand if len(tensors) == 1 else several_operands)(flow)

