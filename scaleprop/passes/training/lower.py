"""Casts the factors of a training step's products, held at exponents that suit their formats.

Every factor is cast once, where its value is made; what the products read is moved data of one
byte. Most values may be held at any of several exponents, see ``choice``: at what they are held at
anyway, where the format allows. Else the exponent is carried from where it costs nothing: the
product that made the value takes it into its alpha, if only operators that pass scales lie in
between. Elsewhere it is one multiplication by a power of two, in the cast's own loop.

Exponents of two factors add up in their product. Those beyond ``MOST`` are not carried: the value
is divided by its power of two before the cast, the product multiplied by it, as by a scale that is
found at run time. Beyond what the dtype has powers for, the exponent is the last that it has; the
report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import ops
from scaleprop.errors import ConfigError
from scaleprop.ops.products import float_element
from scaleprop.passes.exponents import carry, most
from scaleprop.passes.exponents.facts import is_float
from scaleprop.passes.training.calls import call
from scaleprop.passes.training.choice import (
    MOST,
    common_exponent,
    lost_within,
    out_of_range,
    room_for,
    safest,
    scaled_with,
    why_at_run_time,
    within,
)
from scaleprop.passes.training.drift import addends, drifts
from scaleprop.passes.training.head import keep_head_high
from scaleprop.passes.training.layers import StepOutline
from scaleprop.passes.training.reduction import agree
from scaleprop.passes.training.roles import Factor, Product, find_products, is_tangent, source_of
from scaleprop.passes.training.statistics import Sizes, measured_amax
from scaleprop.rules import rule_for

aten: Any = torch.ops.aten
_CAST: Any = aten._to_copy.default
CAST = "scaleprop_cast"  # in the meta of a cast, or of the division before it: its ``Cast``


@dataclasses.dataclass(frozen=True)
class Formats:
    """Element formats of the factors, and how their exponents are found.

    margin: how many powers of two below a format's maximum amax is put at least. Values that may
    drift further get as much room, see ``drift``.
    scaled: False holds every value at exponent 0: for models whose values lie about 1 already.
    head: whether products next to the loss are low too, see ``keep_head_high``.

    Raises ``FormatError`` for an element that torch has no dtype for, ``ConfigError`` for a
    negative margin.
    """

    x: str = "e4m3"
    w: str = "e4m3"
    dy: str = "e5m2"
    margin: int = 2
    scaled: bool = True
    head: bool = False

    def __post_init__(self) -> None:
        for element in (self.x, self.w, self.dy):
            float_element(element)
        if self.margin < 0:
            raise ConfigError(f"margin={self.margin}: amax would overflow. Remedy: 0 or more.")


@dataclasses.dataclass(frozen=True)
class Cast:
    """One value in low precision.

    amax: as measured; None where it is not known.
    drift: how many powers of two it may grow or shrink in training.
    exponent: what it is held at; None where the scale is found at run time.
    why: for a scale at run time, the reason; for an exponent that was not to be chosen, or not as
        far as it should be, what of the value is lost.
    free: whether no multiplication is spent on it: the value is held at this exponent anyway, or
        comes so from the product that made it.
    """

    value: str
    kind: str
    element: str
    amax: float | None
    drift: float
    exponent: int | None
    free: bool
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What was done to a joint graph.

    products: node → role; high: node → why it stays in high precision; rescales: multiplications
    that are left in the graph; unruled: operators that had to be given unscaled values; sizes:
    node → the largest magnitude that exponents were chosen by, None where none was known. outline:
    what the graph was before.
    """

    products: Mapping[str, str]
    casts: tuple[Cast, ...]
    high: Mapping[str, str]
    rescales: int
    unruled: Mapping[str, int]
    sizes: Mapping[str, float] | None = None
    outline: StepOutline | None = None


def lower_products(
    joint: torch.fx.GraphModule,
    parameters: Collection[torch.fx.Node],
    formats: Formats,
    inputs: Sequence[Any] | None,
    sizes: Sizes = measured_amax,
) -> Lowered:
    """Run the linear layers' products of ``joint``, in place, on low-precision data.

    parameters: its inputs that are parameters. inputs: one real batch for all of its inputs;
    without them every scale is found at run time. sizes: how to tell largest magnitudes from them.
    """
    products = find_products(joint.graph, parameters)
    if not formats.head:
        products = keep_head_high(joint.graph, products, parameters)
    factors: dict[tuple[torch.fx.Node, str], Factor] = {}
    for product in products.found:
        for factor in (product.left, product.right):
            factors.setdefault((factor.root, getattr(formats, factor.kind)), factor)
    amax = None
    if inputs is not None:
        amax = agree(sizes(joint, inputs, {root for root, _ in factors} | addends(joint.graph)),
                     joint.graph)
    known = None if amax is None else {node.name: size for node, size in amax.items()}
    casts = _planned(joint, parameters, formats, amax or {}, factors)
    work = _Lowering(joint, formats, products.found)
    if formats.scaled:
        work.move_gradients(casts)
    for planned in casts:
        work.cast(planned)
    for product in products.found:
        work.multiply(product)
    joint.graph.eliminate_dead_code()
    carried = carry(joint, work.wanted)
    folded = _fold(joint)
    joint.graph.lint()
    joint.recompile()
    return Lowered(
        products={product.node.name: product.role for product in products.found},
        casts=tuple(work.casts),
        high={node.name: why for node, why in products.high.items()},
        rescales=len(carried.rescales) - folded,
        unruled=carried.unruled,
        sizes=known,
    )


@dataclasses.dataclass(frozen=True)
class _Planned:
    """A cast to be made; room: the exponents it may be held at, none where ``why`` says so."""

    root: torch.fx.Node
    element: str
    kind: str
    amax: float | None
    drift: float
    room: range
    why: str


def _planned(
    joint: torch.fx.GraphModule, parameters: Collection[torch.fx.Node], formats: Formats,
    amax: Mapping[torch.fx.Node, float], factors: Mapping[tuple[torch.fx.Node, str], Factor],
) -> list[_Planned]:
    drift = drifts(joint.graph, parameters, amax)
    found: list[_Planned] = []
    for (root, element), factor in factors.items():
        size = amax.get(root)
        if not formats.scaled:
            why, room = out_of_range(element, size), range(1)
        else:
            why = why_at_run_time(element, size, drift[root])
            room = range(0)
            if not why and size is not None:
                best = room_for(element, size, drift[root], formats.margin)
                room, why = _possible(best, element, size, root.meta["val"].dtype)
        found.append(_Planned(root, element, factor.kind, size, drift[root], room, why))
    return found


def _possible(
    best: range, element: str, amax: float, dtype: torch.dtype
) -> tuple[range, str]:
    """The exponents of ``best`` that the graph can carry; else one alone, that ``dtype`` has powers
    of two for, and what is lost if that is not of ``best``."""
    carried = within(best, MOST)
    if carried[0] in best:
        return carried, ""
    wide = dtype if dtype.itemsize > 2 else torch.float32
    last = int(-math.log2(torch.finfo(wide).smallest_normal))
    chosen = within(best, last)[:1]
    return chosen, lost_within(element, amax, chosen[0], best, str(wide).removeprefix("torch."))


class _Lowering:
    def __init__(
        self, joint: torch.fx.GraphModule, formats: Formats, products: Sequence[Product]
    ) -> None:
        self.graph = joint.graph
        self._found = products
        self._products = {product.node for product in products}
        moves = (factor.moves for product in products for factor in (product.left, product.right))
        self._inside = self._products.union(*moves)
        self.formats = formats
        self.wanted: dict[torch.fx.Node, int] = {}
        self.casts: list[Cast] = []
        # what values are held at anyway, where that is not 0
        self._held: dict[torch.fx.Node, int] = {}
        # (value, element) → its data, and the scale that was found at run time
        self._data: dict[tuple[torch.fx.Node, str], tuple[torch.fx.Node, Any]] = {}
        self._moved: dict[tuple[torch.fx.Node, torch.fx.Node], torch.fx.Node] = {}

    def move_gradients(self, casts: Sequence[_Planned]) -> None:
        """Hold the incoming gradients, and all that follows them, at the exponent that suits most
        casts, if it saves more multiplications than bringing the results back costs."""
        graph = self.graph
        tangents = [node for node in graph.find_nodes(op="placeholder")
                    if is_tangent(node) and is_float(node.meta["val"])]
        moved = scaled_with(graph, tangents)
        rooms = [cast.room for cast in casts
                 if moved.get(cast.root) and cast.room and abs(cast.room[0]) <= MOST]
        exponent = common_exponent(rooms)
        by_product = {product.node for product in self._found if product.role == "wgrad"}
        results = [node for node in graph.output_node().all_input_nodes
                   if moved.get(node) and source_of(node)[0] not in by_product]
        saved = sum(exponent in room for room in rooms) - sum(0 in room for room in rooms)
        fits = all(_fits(node, exponent) for node, passes in moved.items() if passes)
        if saved <= len(tangents) + len(results) or not fits:
            return
        for tangent in tangents:
            start = self._call(aten.alias.default, (tangent,), tangent, _last_input(tangent))
            tangent.replace_all_uses_with(start, lambda user, start=start: user is not start)
            self.wanted[start] = exponent
        self._held = {node: exponent for node, passes in moved.items() if passes}
        self.wanted.update((product.node, exponent) for product in self._found
                           if product.role == "dgrad" and moved.get(product.node))

    def cast(self, planned: _Planned) -> None:
        """Cast a value right after it is made."""
        root, element = planned.root, planned.element
        at = _last_input(root)
        exponent: int | None = None
        scale, free = None, False
        if planned.room and abs(planned.room[0]) > MOST:
            exponent = planned.room[0]
            scale = 2.0**exponent
            source = at = self._divided(root, exponent, at)
        elif planned.room:
            source, exponent, free = self._held_in(planned.room, root)
            at = at if source is root else source
        else:
            scale = self._call(ops.power_scale, (root, element, self.formats.margin), root, at)
            source = at = self._call(aten.div.Tensor, (root, scale), root, scale)
        data = self._call(ops.cast, (source, element), root, at)
        self._data[root, element] = (data, scale)
        made = Cast(root.name, planned.kind, element, planned.amax, planned.drift, exponent, free,
                    planned.why)
        (data if exponent is not None else source).meta[CAST] = made
        self.casts.append(made)

    def _held_in(self, room: range, root: torch.fx.Node) -> tuple[torch.fx.Node, int, bool]:
        """``root`` at an exponent in ``room``, which one, and whether that was for nothing."""
        held = self._held.get(root, 0)
        if held in room and self.wanted.setdefault(root, held) == held:
            return root, held, True
        exponent = safest(room)
        fits = _fits(root, exponent)
        if fits and self._want(root, exponent):
            return root, exponent, True
        # held so for the cast alone
        at = _last_input(root)
        source = self._call(aten.alias.default, (root,), root, at) if fits else (
            self._in_float32(root, at))
        self.wanted[source] = exponent
        return source, exponent, False

    def _divided(self, root: torch.fx.Node, exponent: int, at: torch.fx.Node) -> torch.fx.Node:
        """``root``·2^-exponent, an exponent that no value is held at."""
        if root.meta["val"].dtype.itemsize < 4:
            root = at = self._in_float32(root, at)
        return self._call(aten.mul.Tensor, (root, 2.0**-exponent), root, at)

    def _in_float32(self, root: torch.fx.Node, at: torch.fx.Node) -> torch.fx.Node:
        """A copy that has room for any exponent."""
        return self._call(_CAST, (root,), root, at, {"dtype": torch.float32})

    def _want(self, root: torch.fx.Node, exponent: int) -> bool:
        """Ask for the exponent of the product that ``root`` comes from, if that is for nothing:
        nothing else reads it, and only operators that pass scales lie in between."""
        if any(_minds(user, root) for user in root.users if user not in self._inside):
            return False
        node: torch.fx.Node | None = root
        while node is not None and node not in self._products and _fits(node, exponent):
            node = _only_source(node)
        if node is None or node.target is aten.addmm.default or not _fits(node, exponent):
            return False
        self.wanted[node] = exponent
        return True

    def multiply(self, product: Product) -> None:
        """Replace a product by one of low-precision data."""
        node = product.node
        value = node.meta["val"]
        data, scales = zip(*map(self._read, (product.left, product.right)), strict=True)
        half = most(value.dtype) < most(torch.float32)  # no room in float16 for sums of exponents
        dtype = torch.float32 if half else value.dtype
        result = self._call(ops.gemm, (*data, 1.0, dtype), node)
        self.wanted[result] = self.wanted.pop(node, 0)
        # before float16, which may have no room for the product of the data
        for scale in self._together([scale for scale in scales if scale is not None], node):
            result = self._call(aten.mul.Tensor, (result, scale), node)
        if half:
            result = self._call(_CAST, (result,), node, kwargs={"dtype": value.dtype})
        if node.target is aten.addmm.default:
            result = self._call(aten.add.Tensor, (result, node.args[0]), node)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _together(self, scales: list[Any], at: torch.fx.Node) -> list[Any]:
        """A fixed scale and another as one, so that a large one does not overflow where a small one
        follows; two fixed ones as they are where both together are no number of float32."""
        first, second = [*scales, None, None][:2]
        if isinstance(first, float) and isinstance(second, float):
            one = first * second
            return [one] if 2.0**-126 <= one < 2.0**128 else scales
        if isinstance(first, float) and second is not None:
            first, second = second, first
        if isinstance(second, float):
            return [self._call(aten.mul.Tensor, (first, second), at)]
        return scales  # found at run time, both have room with the data

    def _read(self, factor: Factor) -> tuple[torch.fx.Node, Any]:
        """The factor's data as the product reads it, and its run-time scale."""
        data, scale = self._data[factor.root, getattr(self.formats, factor.kind)]
        for move in factor.moves:
            key = (data, move)
            if key not in self._moved:
                self._moved[key] = self._call(move.target, (data, *move.args[1:]), move,
                                              kwargs=move.kwargs)
            data = self._moved[key]
        return data, scale

    def _call(
        self, target: Any, args: tuple[Any, ...], at: torch.fx.Node,
        after: torch.fx.Node | None = None, kwargs: Mapping[str, Any] | None = None,
    ) -> torch.fx.Node:
        """A call that takes its provenance from ``at``, and its place too: before it, or ``after``
        another node."""
        place = self.graph.inserting_before(at) if after is None else \
            self.graph.inserting_after(after)
        with place:
            return call(self.graph, target, args, at, kwargs)


def _values(node: torch.fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if is_float(v)]


def _fits(node: torch.fx.Node, exponent: int) -> bool:
    """Whether the dtypes of a node's values have room for an exponent."""
    return all(abs(exponent) <= most(value.dtype) for value in _values(node))


def _last_input(node: torch.fx.Node) -> torch.fx.Node:
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _only_source(node: torch.fx.Node) -> torch.fx.Node | None:
    """The value whose scale ``node`` passes on, if it is the only one, and read by no other."""
    rule = rule_for(node.target) if node.op == "call_function" else None
    law = rule.law(node) if rule is not None else None
    if law is None or law.follows or law.outputs:
        return None
    scaled = [(node.args[place], degree) for place, degree in law.degrees.items()
              if degree and place < len(node.args) and isinstance(node.args[place], torch.fx.Node)]
    if len(scaled) != 1 or scaled[0][1] != 1:
        return None
    source: Any = scaled[0][0]
    others = [user for user in source.users if user is not node]
    return None if any(_minds(user, source) for user in others) else source


def _minds(reader: torch.fx.Node, value: torch.fx.Node) -> bool:
    """Whether ``reader`` depends on the scale of ``value``; one that looks at signs does not."""
    rule = rule_for(reader.target) if reader.op == "call_function" else None
    law = rule.law(reader) if rule is not None else None
    if law is None or not law.exact or value in reader.kwargs.values():
        return True
    if rule is not None and rule.moves:
        return any(_minds(user, reader) for user in reader.users)
    for place, given in enumerate(reader.args):
        found: set[torch.fx.Node] = set()
        torch.fx.map_arg(given, found.add)
        degrees = [degrees.get(place) for degrees in law.outputs or (law.degrees,)]
        if value in found and any(degree != 0 for degree in degrees):
            return True
    return False


def _fold(joint: torch.fx.GraphModule) -> int:
    """Take rescales into the alpha of the product that they follow; how many."""
    count = 0
    for node in joint.graph.find_nodes(op="call_function", target=ops.gemm):
        (user, *more) = node.users
        arguments: Any = user.args
        if more or user.target is not aten.mul.Tensor or not isinstance(arguments[1], float):
            continue
        alpha: Any = node.args[2]
        alpha *= arguments[1]
        bound = 2.0 ** most(torch.float32)
        if not 1.0 / bound <= abs(alpha) <= bound:
            continue  # the data of one factor are multiplied with it
        node.update_arg(2, alpha)
        user.replace_all_uses_with(node)
        joint.graph.erase_node(user)
        count += 1
    return count
