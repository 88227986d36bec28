"""Casts the factors of a training step's products, held at exponents that suit their formats.

Every factor is cast once, where its value is made; what the products read is moved data of one
byte. An exponent is carried from where it costs nothing: the product that made the value takes it
into its alpha, if only operators that pass scales lie in between. Elsewhere it is one
multiplication by a power of two, in the cast's own loop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.ops.products import float_element
from scaleprop.passes.exponents import carry
from scaleprop.passes.training.roles import Factor, Product, find_products
from scaleprop.passes.training.statistics import exponent_for, measured_amax
from scaleprop.rules import rule_for

aten: Any = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Formats:
    """Element formats of the factors, and how many powers of two below their maximum amax lies."""

    x: str = "e4m3"
    w: str = "e4m3"
    dy: str = "e5m2"
    margin: int = 2


@dataclasses.dataclass(frozen=True)
class Cast:
    """One value in low precision.

    exponent: what it is held at; None where the scale is found at run time.
    free: whether the exponent came with the product that made the value.
    """

    value: str
    kind: str
    element: str
    amax: float | None
    exponent: int | None
    free: bool


@dataclasses.dataclass(frozen=True)
class Lowered:
    """What was done to a joint graph.

    products: node → role; high: node → why it stays in high precision; rescales: multiplications
    that are left in the graph; unruled: operators that had to be given unscaled values.
    """

    products: Mapping[str, str]
    casts: tuple[Cast, ...]
    high: Mapping[str, str]
    rescales: int
    unruled: Mapping[str, int]


def lower_products(
    joint: torch.fx.GraphModule,
    parameters: Collection[torch.fx.Node],
    formats: Formats,
    inputs: Sequence[Any] | None,
) -> Lowered:
    """Run the linear layers' products of ``joint``, in place, on low-precision data.

    parameters: its inputs that are parameters. inputs: one real batch for all of its inputs;
    without them every scale is found at run time.
    """
    products = find_products(joint.graph, parameters)
    factors: dict[tuple[torch.fx.Node, str], Factor] = {}
    for product in products.found:
        for factor in (product.left, product.right):
            factors.setdefault((factor.root, getattr(formats, factor.kind)), factor)
    roots = {root for root, _ in factors}
    amax = {} if inputs is None else measured_amax(joint, inputs, roots)
    work = _Lowering(joint, formats, products.found)
    for (root, element), factor in factors.items():
        # zeros say nothing: a gradient of unknown size, or a weight that starts at zero
        work.cast(root, element, factor.kind, amax.get(root) or None)
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
    )


class _Lowering:
    def __init__(
        self, joint: torch.fx.GraphModule, formats: Formats, products: Sequence[Product]
    ) -> None:
        self.graph = joint.graph
        self._products = {product.node for product in products}
        moves = (factor.moves for product in products for factor in (product.left, product.right))
        self._inside = self._products.union(*moves)
        self.formats = formats
        self.wanted: dict[torch.fx.Node, int] = {}
        self.casts: list[Cast] = []
        # (value, element) → its data, and the scale that was found at run time
        self._data: dict[tuple[torch.fx.Node, str], tuple[torch.fx.Node, Any]] = {}
        self._moved: dict[tuple[torch.fx.Node, torch.fx.Node], torch.fx.Node] = {}

    def cast(self, root: torch.fx.Node, element: str, kind: str, amax: float | None) -> None:
        """Cast ``root`` right after it is made."""
        mode = compat.fake_mode_of(self.graph)
        last = root
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        source, scale = root, None
        exponent, free = None, False
        with mode, self.graph.inserting_after(last):
            if amax is None:
                scale = self._call(ops.power_scale, (root, element, self.formats.margin), root)
                last = scale
            else:
                exponent = exponent_for(amax, float_element(element).max, self.formats.margin)
        with mode, self.graph.inserting_after(last):
            if scale is not None:
                source = self._call(aten.div.Tensor, (root, scale), root)
                last = source
        if exponent:
            free = self._want(root, exponent)
            if not free:  # held so for the cast alone
                with mode, self.graph.inserting_after(last):
                    source = last = self._call(aten.alias.default, (root,), root)
                self.wanted[source] = exponent
        with mode, self.graph.inserting_after(last):
            data = self._call(ops.cast, (source, element), root)
        self._data[root, element] = (data, scale)
        self.casts.append(Cast(root.name, kind, element, amax, exponent, free))

    def _want(self, root: torch.fx.Node, exponent: int) -> bool:
        """Ask for the exponent of the product that ``root`` comes from, if that is for nothing:
        nothing else reads it, and only operators that pass scales lie in between."""
        if not self._inside.issuperset(root.users):
            return False
        node: torch.fx.Node | None = root
        while node is not None and node not in self._products:
            node = _only_source(node)
        if node is None or node.target is aten.addmm.default:
            return False
        self.wanted[node] = exponent
        return True

    def multiply(self, product: Product) -> None:
        """Replace a product by one of low-precision data."""
        node = product.node
        value = node.meta["val"]
        with compat.fake_mode_of(self.graph), self.graph.inserting_before(node):
            data, scales = zip(*map(self._read, (product.left, product.right)), strict=True)
            result = self._call(ops.gemm, (*data, 1.0, value.dtype), node)
            self.wanted[result] = self.wanted.pop(node, 0)
            for scale in scales:
                if scale is not None:
                    result = self._call(aten.mul.Tensor, (result, scale), node)
            if node.target is aten.addmm.default:
                result = self._call(aten.add.Tensor, (result, node.args[0]), node)
        node.replace_all_uses_with(result)
        self.graph.erase_node(node)

    def _read(self, factor: Factor) -> tuple[torch.fx.Node, Any]:
        """The factor's data as the product reads it, and its run-time scale."""
        data, scale = self._data[factor.root, getattr(self.formats, factor.kind)]
        for move in factor.moves:
            key = (data, move)
            if key not in self._moved:
                self._moved[key] = self._call(move.target, (data, *move.args[1:]), move,
                                              **move.kwargs)
            data = self._moved[key]
        return data, scale

    def _call(
        self, target: Any, args: tuple[Any, ...], at: torch.fx.Node, **kwargs: Any
    ) -> torch.fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        given: Any = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])  # type: ignore[arg-type]
        node.meta = {**at.meta, "val": target(*given[0], **given[1])}
        node.meta.pop("tensor_meta", None)
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
    return source if len(source.users) == 1 else None


def _fold(joint: torch.fx.GraphModule) -> int:
    """Take rescales into the alpha of the product that they follow; how many."""
    count = 0
    for node in joint.graph.find_nodes(op="call_function", target=ops.gemm):
        (user, *more) = node.users
        arguments: Any = user.args
        if more or user.target is not aten.mul.Tensor or not isinstance(arguments[1], float):
            continue
        alpha: Any = node.args[2]
        node.update_arg(2, alpha * arguments[1])
        user.replace_all_uses_with(node)
        joint.graph.erase_node(user)
        count += 1
    return count
