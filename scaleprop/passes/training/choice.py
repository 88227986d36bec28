"""At which exponent each value is held, for the whole graph at once.

A format is as accurate at one exponent as at another, as long as what matters lies among its normal
numbers: a value has a whole range of exponents to choose from, its room. Where that includes what
the value is held at anyway, the choice costs nothing. Forward that is 0. Backward it is what the
incoming gradient is held at: nearly all that is done with gradients is linear, so that one
multiplication there moves them all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.fx

from scaleprop.ops.products import float_element
from scaleprop.passes.exponents.facts import has_scale, is_float
from scaleprop.passes.training.statistics import exponent_for
from scaleprop.rules import rule_for

BINADES = 5  # below amax, of normal numbers: Gaussian data then round 0.4 % worse than with all
MOST = 50  # of an exponent that the graph carries: float32 has room for the sum of two factors'


def why_at_run_time(element: str, amax: float | None, drift: float) -> str:
    """Why an exponent cannot be fixed; "" where it can."""
    if amax is None or amax == 0.0:
        return _unknown(amax)
    if not math.isfinite(amax):
        return "NaN or Inf when measured"
    room = headroom(element)
    return f"may drift by 2^{drift:.0f}, {element} has room for 2^{room}" if drift > room else ""


def _unknown(amax: float | None) -> str:
    # zeros: a gradient that comes from outside, or a weight that starts at zero
    return "of unknown size" if amax is None else "all zeros when measured"


def headroom(element: str) -> int:
    """How far amax may fall with the eight binades below it still normal numbers."""
    fmt = float_element(element)
    return fmt.emax - fmt.emin - 8


def out_of_range(element: str, amax: float | None) -> str:
    """What is lost of a value that is cast as it is, at exponent 0; "" where nothing much is."""
    fmt = float_element(element)
    if amax is None or amax == 0.0:
        return _unknown(amax)
    if not amax <= fmt.max:
        return f"amax {amax:.3g} is beyond the {fmt.max:g} of {element}: saturates"
    least = 2.0**fmt.emin
    return f"amax {amax:.3g} is below the normal numbers of {element}, from {least:.3g}: " \
        "underflows" if amax < least else ""


def room_for(element: str, amax: float, drift: float, margin: int) -> range:
    """The exponents at which a value may grow by 2^margin and by 2^drift, and fall by 2^drift; only
    the least of them where the format has not room for both."""
    fmt = float_element(element)
    moves = math.ceil(drift)
    least = exponent_for(amax, fmt.max, max(margin, moves))
    most = math.frexp(amax)[1] - 1 - fmt.emin - BINADES - moves
    return range(least, max(least, most) + 1)


def within(room: range, most: int) -> range:
    """The exponents of ``room`` that lie in ±``most``; the nearest to them where none does."""
    low, high = (max(-most, min(exponent, most)) for exponent in (room[0], room[-1]))
    return range(low, high + 1)


def lost_within(element: str, amax: float, exponent: int, room: range, dtype: str) -> str:
    """What is lost of a value whose ``room`` holds no power of two that ``dtype`` has; "" where
    ``exponent`` lies in it."""
    if exponent in room:
        return ""
    lost = out_of_range(element, math.ldexp(amax, -exponent)) or "loses precision"
    return f"2^{room[0]} is no number of {dtype}: held at 2^{exponent} instead; {lost}"


def safest(room: range) -> int:
    """Two thirds up: what grows saturates at once, what shrinks loses accuracy bit by bit."""
    return room[2 * len(room) // 3]


def common_exponent(rooms: Sequence[range]) -> int:
    """The exponent in most rooms; of several, that nearest to 0."""
    candidates = sorted({end for room in rooms for end in (room[0], room[-1])}, key=abs)
    return max(candidates, key=lambda exponent: sum(exponent in room for room in rooms), default=0)


def scaled_with(
    graph: torch.fx.Graph, sources: Collection[torch.fx.Node]
) -> Mapping[torch.fx.Node, bool]:
    """What depends on ``sources`` → whether it is held at 2^e where they all are."""
    found: dict[torch.fx.Node, bool] = {source: True for source in sources}
    for node in graph.nodes:
        if node.op == "call_function" and any(map(found.__contains__, node.all_input_nodes)):
            found[node] = _passes(node, found)
    return found


def _passes(node: torch.fx.Node, found: Mapping[torch.fx.Node, bool]) -> bool:
    if node.target is operator.getitem:
        return all(found.get(source, False) for source in node.all_input_nodes)
    rule = rule_for(node.target)
    law = rule.law(node) if rule is not None else None
    if law is None or not (law.exact and _is_float(node)):
        return False
    if law.follows and not law.scaled:
        terms = [source for place in law.follows if place < len(node.args)
                 for source in _nodes(node.args[place]) if has_scale(source)]
        return bool(terms) and all(found.get(term, False) for term in terms)
    moved = {place for place, given in enumerate(node.args)
             if any(source in found for source in _nodes(given))}
    one = all(found[source] for place in moved for source in _nodes(node.args[place])
              if source in found)
    return one and all(sum(degrees.get(place, 0) for place in moved) == 1
                       for degrees in law.outputs or (law.degrees,))


def _nodes(given: object) -> list[torch.fx.Node]:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(given, found.append)  # type: ignore[arg-type]
    return found


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(map(is_float, values))
