"""Rewrite a graph so that its values are held at wanted exponents, and mean what they meant.

Scales pass through operators by their rules' homogeneity; where an operator needs another scale
than its input has, or the wanted exponent is another than comes out, a multiplication by a power of
two is inserted. Those are exact, so the graph's results are what they were to the last bit, unless
data under- or overflows.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop import _torch_compat as compat
from scaleprop.errors import PassError, describe
from scaleprop.passes.exponents.facts import has_scale, is_float
from scaleprop.rules import Homogeneity, rule_for
from scaleprop.rules.laws import scale_free

_ROOM = 0.8  # of a dtype's exponents: the rest is for data that lie about one, larger or smaller
_RESCALE: Any = torch.ops.aten.mul.Tensor
_UNSCALED = Homogeneity()


@dataclasses.dataclass(frozen=True)
class Carried:
    """What ``carry`` made of a graph.

    exponents: value → e, for each float value of the rewritten graph that is held at another
        exponent than 0.
    rescales: the multiplications that were inserted.
    unruled: operators without a rule, which had to be given unscaled inputs, and how often.
    """

    module: torch.fx.GraphModule
    exponents: Mapping[torch.fx.Node, int]
    rescales: tuple[torch.fx.Node, ...]
    unruled: Mapping[str, int]


def most(dtype: torch.dtype) -> int:
    """The largest |exponent| that a value of this float dtype may be held at: 11 in float16, 100 in
    bfloat16 and float32, 817 in float64. Data of one byte are scaled before they are cast, in
    float32 mostly."""
    if dtype.itemsize == 1:
        dtype = torch.float32
    return int(_ROOM * -math.log2(torch.finfo(dtype).smallest_normal))


def carry(module: torch.fx.GraphModule, wanted: Mapping[torch.fx.Node, int]) -> Carried:
    """Hold the values of ``module``, in place, at the exponents ``wanted`` of some of them.

    The graph's inputs and outputs stay unscaled.

    Raises:
        PassError: where an exponent is beyond ``most`` of its value's dtype.
    """
    work = _Carrier(module.graph, wanted)
    work.run()
    module.graph.lint()
    module.recompile()
    exponents = {node: e for node, e in work.exponents.items() if e}
    return Carried(module, exponents, tuple(work.rescales), dict(work.unruled))


class _Carrier:
    def __init__(self, graph: torch.fx.Graph, wanted: Mapping[torch.fx.Node, int]) -> None:
        self.graph = graph
        self.wanted = wanted
        # what a value is held at; 0 where nothing is said
        self.exponents: dict[torch.fx.Node, int] = {}
        # operators with several results: what each is held at
        self.parts: dict[torch.fx.Node, Sequence[int]] = {}
        self.rescales: list[torch.fx.Node] = []
        self.unruled: Counter[str] = Counter()
        self._made: dict[tuple[torch.fx.Node, int], torch.fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            match node.op:
                case "call_function" if node.target is operator.getitem:
                    source, index = node.args
                    parts = self.parts.get(source)
                    self._settle(node, parts[index] if parts else 0)
                case "call_function":
                    self._call(node)
                case "output":
                    self._align(node, {}, {})
                case _:
                    self._settle(node, 0)

    def _call(self, node: torch.fx.Node) -> None:
        rule = rule_for(node.target)
        law = rule.law(node) if rule is not None else None
        if rule is None and any(map(has_scale, node.all_input_nodes)):
            self.unruled[str(node.target)] += 1
        if law is None or _counts(node, law):
            law = _UNSCALED
        common = self._common(node, law)
        if any(abs(self._out(node, law, index, common)) > bound
               for index, bound in enumerate(_bounds(node))) or not _reach(node, law, common):
            # the exponents of its factors add up to too much, or a term cannot be held where
            # another is
            law, common = _UNSCALED, 0
        self._align(node, dict.fromkeys(law.follows, common), _free(law))
        if isinstance(node.meta.get("val"), (tuple, list)):
            self.parts[node] = [
                self._out(node, law, index, common) for index in range(len(_bounds(node)))
            ]
        else:
            self._settle(node, self._out(node, law, 0, common))

    def _out(self, node: torch.fx.Node, law: Homogeneity, index: int, common: int) -> int:
        return self._product(node, law, index) if law.scaled else common

    def _product(self, node: torch.fx.Node, law: Homogeneity, index: int) -> int:
        """What comes out of a product, as the exponents of what goes in say."""
        return sum(
            degree * self._held(node, place) for place, degree in law.of_output(index).items()
        )

    def _common(self, node: torch.fx.Node, law: Homogeneity) -> int:
        """The exponent that all arguments in ``follows`` are brought to."""
        if law.scaled or not law.follows:
            return self._product(node, law, 0)
        given = [leaf for place in law.follows for leaf in pytree.tree_leaves(_at(node, place))]
        if any(map(_is_number, given)):
            return 0
        held = {
            self.exponents.get(x, 0) for x in given if isinstance(x, torch.fx.Node) and has_scale(x)
        }
        want = self.wanted.get(node)
        return want if want in held else max(held, default=0)

    def _held(self, node: torch.fx.Node, place: int) -> int:
        value = _at(node, place)
        return self.exponents.get(value, 0) if isinstance(value, torch.fx.Node) else 0

    def _align(self, node: torch.fx.Node, fixed: Mapping[int, int], free: Collection[int]) -> None:
        """Let ``node`` read its arguments at these exponents; at 0 all that are not ``free``."""

        def read(place: int) -> Callable[[torch.fx.Node], torch.fx.Node]:
            return lambda value: self._rescaled(value, fixed.get(place, 0))

        node.args = tuple(
            arg if place in free else torch.fx.map_arg(arg, read(place))
            for place, arg in enumerate(node.args)
        )
        node.kwargs = torch.fx.map_arg(node.kwargs, read(-1))

    def _settle(self, node: torch.fx.Node, natural: int) -> None:
        """Note what a value is held at; its readers get it as it is wanted."""
        if not has_scale(node):
            return
        self.exponents[node] = natural
        readers = list(node.users)
        moved = self._rescaled(node, self.wanted.get(node, natural))
        if moved is not node:
            for reader in readers:
                reader.replace_input_with(node, moved)

    def _rescaled(self, value: torch.fx.Node, exponent: int) -> torch.fx.Node:
        """``value``'s data at another exponent; made once."""
        held = self.exponents.get(value, 0)
        if held == exponent or not has_scale(value):
            return value
        dtype: torch.dtype = value.meta["val"].dtype
        bound = most(dtype)
        if abs(exponent) > bound:
            raise PassError(f"{describe(value)}: an exponent of {exponent} (held at {held}) is "
                            f"beyond ±{bound}, which {dtype} has room for. Remedy: clamp it.")
        if abs(held - exponent) > bound:  # two factors
            return self._rescaled(self._rescaled(value, 0), exponent)
        key = (value, exponent)
        if key not in self._made:
            with self.graph.inserting_after(_last_input(value)):
                made = self.graph.call_function(_RESCALE, (value, 2.0 ** (held - exponent)))
            made.meta = {**value.meta, "val": compat.same_kind(value.meta["val"])}
            self.exponents[made] = exponent
            self.rescales.append(made)
            self._made[key] = made
            self._made[made, held] = value  # the way back costs nothing
        return self._made[key]


def _bounds(node: torch.fx.Node) -> list[float]:
    """What the exponent of each result may be at most; integers have none."""
    value = node.meta.get("val")
    results: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
    return [most(result.dtype) if is_float(result) else math.inf for result in results]


def _reach(node: torch.fx.Node, law: Homogeneity, exponent: int) -> bool:
    """Whether the dtypes of all arguments in ``follows`` have room for an exponent."""
    terms = [leaf for place in law.follows for leaf in pytree.tree_leaves(_at(node, place))
             if isinstance(leaf, torch.fx.Node) and has_scale(leaf)]
    return all(abs(exponent) <= most(term.meta["val"].dtype) for term in terms)


def _counts(node: torch.fx.Node, law: Homogeneity) -> bool:
    """Whether numbers go in and integers come out, which have no scale to carry: a sum of dtype
    int64, say. Comparisons carry none on purpose."""
    value = node.meta.get("val")
    whole = isinstance(value, torch.Tensor) and not is_float(value)
    return whole and any(degree for degree in law.degrees.values())


def _free(law: Homogeneity) -> frozenset[int]:
    """The arguments that may be held at any exponent, the result staying exact."""
    if law.exact:
        return law.scaled
    return frozenset(place for place, degree in law.degrees.items() if degree)


def _last_input(node: torch.fx.Node) -> torch.fx.Node:
    """Where code that reads ``node`` may begin: after it, and after all of the graph's inputs."""
    while node.op == "placeholder" and node.next.op == "placeholder":
        node = node.next
    return node


def _at(node: torch.fx.Node, place: int) -> Any:
    return node.args[place] if place < len(node.args) else None


def _is_number(given: Any) -> bool:
    """Whether an argument is the same at every exponent but 0: a number, or integers."""
    if isinstance(given, torch.fx.Node):
        return not is_float(given.meta.get("val"))
    return isinstance(given, (int, float)) and not scale_free(given)
