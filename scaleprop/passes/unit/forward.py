"""Multipliers on the way forward: every factor of a product, and every sum, at unit RMS.

A multiplier is put only where it changes nothing but a parameter's size: where all readers pass
it on, one power of it, to a product with a parameter, to a norm, or to a residual sum, whose
weights are defined on unit values. Logits, masks, positions and losses therefore keep their
meaning, in any architecture.

Products with parameters take 1/√fan-in (Glorot & Bengio, 2010; Blake et al., Unit Scaling, 2023,
table A.2); everything else is measured on the example inputs, layer after layer, with all
multipliers before it in place.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx

from scaleprop.ops.scaling import scale_fwd_bwd
from scaleprop.passes.unit.module import UnitScaled
from scaleprop.passes.unit.schemes import Scheme
from scaleprop.passes.unit.structure import Structure, is_float
from scaleprop.passes.unit.writer import INHERITED
from scaleprop.rules import rule_for

aten: Any = torch.ops.aten

BAND = 0.1  # how far from 1 an RMS may be without a multiplier
_OPERAND_BAND = math.sqrt(2)  # of a product's factor; beyond, a power of two
_WITHOUT_BIAS = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A constant on a value: what for, and its RMS before, on the example inputs."""

    value: str
    factor: float
    rms: float
    why: str


def scale_parameters(module: UnitScaled, structure: Structure) -> dict[str, float]:
    """Divide parameters of products by their RMS, in place, and zero their biases; by what.

    A parameter that is all zeros stays so, and one of another use than in products too.
    """
    divided: dict[str, float] = {}
    seen: set[int] = set()
    with torch.no_grad():
        for node, product in structure.products.items():
            weight = module.get_parameter(str(product.parameter.target))
            size = rms(weight)
            if id(weight) not in seen and size > 0:
                seen.add(id(weight))
                weight.div_(size)
                divided[str(product.parameter.target)] = size
            bias: Any = node.args[product.bias] if product.bias is not None else None
            if bias is not None and bias.op == "get_attr":
                module.get_parameter(str(bias.target)).zero_()
    return divided


def scale_forward(
    module: UnitScaled, structure: Structure, scheme: Scheme, inputs: Sequence[Any]
) -> list[Multiplier]:
    """Insert multipliers, in place; inputs: the placeholders' values.

    Returns them in the graph's order.
    """
    work = _Forward(module, structure, scheme)
    with torch.no_grad(), repeatable(module):
        work.run(inputs)
    return work.multipliers


def rms(x: torch.Tensor) -> float:
    """Over the elements that are finite; 0 where there are none. −∞ masks have no size."""
    finite = x[torch.isfinite(x)].double()
    return math.sqrt(float(finite.square().mean())) if finite.numel() else 0.0


@contextmanager
def repeatable(module: torch.nn.Module) -> Generator[None]:
    """Run a module without leaving a trace: buffers and random state are put back."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


class _Forward:
    def __init__(self, module: UnitScaled, structure: Structure, scheme: Scheme) -> None:
        self.graph = module.graph
        self.structure, self.scheme = structure, scheme
        self.multipliers: list[Multiplier] = []
        self._interpreter = torch.fx.Interpreter(module, garbage_collect_values=False)
        self._values = self._interpreter.env
        self._operands: dict[torch.fx.Node, torch.fx.Node] = {}

    def run(self, inputs: Sequence[Any]) -> None:
        self._interpreter.args_iter = iter(inputs)
        for node in list(self.graph.nodes):
            if node.op == "output":
                break
            if node in self.structure.products:
                self._product(node)
            elif node in self.structure.residuals:
                self._residual(node)
            else:
                self._evaluate(node)
                if self._is_normalised(node):
                    self._normalise(node)

    def _evaluate(self, node: torch.fx.Node) -> torch.fx.Node:
        self._values[node] = self._interpreter.run_node(node)
        return node

    def _rms(self, node: torch.fx.Node) -> float:
        return rms(self._values[node])

    def _product(self, node: torch.fx.Node) -> None:
        """y = (Σ (c·x)·w)·α + b."""
        product = self.structure.products[node]
        if product.activation is not None:
            x: Any = node.args[product.activation]
            node.update_arg(product.activation, self._operand(x))
        bias: Any = None if product.bias is None else node.args[product.bias]
        if product.bias is not None:
            self._drop_bias(node, product.bias)
        before = self._rms(self._evaluate(node))
        is_readout = node in self.structure.readouts
        factor = 1.0 if product.activation is None else \
            self.scheme.readout(product.fan_in) if is_readout else product.fan_in**-0.5
        result = node
        if factor != 1.0:
            why = "readout" if is_readout else f"1/√{product.fan_in}"
            result = self._scaled(node, factor, before, why)
        if bias is not None:
            self._add_bias(result, bias, product.parameter.meta["val"].dim())

    def _operand(self, x: torch.fx.Node) -> torch.fx.Node:
        """A product's factor at unit RMS, up to √2: one multiplier for all that read it."""
        if x in self._operands:
            return self._operands[x]
        size = self._rms(x)
        made = x
        if size > 0 and not 1 / _OPERAND_BAND <= size <= _OPERAND_BAND:
            factor = 2.0 ** -round(math.log2(size))
            made = self._multiplied(x, factor, size, "factor of a product")
        self._operands[x] = made
        return made

    def _drop_bias(self, node: torch.fx.Node, place: int) -> None:
        if node.target in _WITHOUT_BIAS:  # the bias comes first
            node.target = _WITHOUT_BIAS[node.target]
            node.args = node.args[1:3]
        else:
            node.update_arg(place, None)

    def _add_bias(self, result: torch.fx.Node, bias: torch.fx.Node, rank: int) -> None:
        """rank: of the weight; a convolution's has more than two axes, its channels come second."""
        at = result
        if rank > 2 and bias.meta["val"].dim() == 1:
            at = bias = self._evaluate(
                self._call(aten.view.default, (bias, [-1, *[1] * (rank - 2)]), at))
        made = self._call(aten.add.Tensor, (result, bias), at)
        result.replace_all_uses_with(made, lambda user: user is not made)
        self._evaluate(made)

    def _residual(self, node: torch.fx.Node) -> None:
        residual = self.structure.residuals[node]
        weights = self.scheme.weights(self.structure, residual)
        for place, weight in zip((residual.skip, 1 - residual.skip), weights, strict=True):
            term: Any = node.args[place]
            # the sum is where they meet: a multiplier for this reader alone
            made = self._call(scale_fwd_bwd, (term, weight, weight), term)
            node.update_arg(place, made)
            self._evaluate(made)
            self.multipliers.append(Multiplier(term.name, weight, self._rms(term),
                                               "stream" if place == residual.skip else "branch"))
        self._evaluate(node)

    def _is_normalised(self, node: torch.fx.Node) -> bool:
        """Whether ``node`` computes a signal that a multiplier may be put on."""
        if node.op != "call_function" or node not in self.structure.signals or not is_float(node):
            return False
        rule = rule_for(node.target)
        if rule is None or rule.moves or rule.family in ("cast", "movement", "norm", "creation"):
            return False
        return self._absorbs(node, set())

    def _normalise(self, node: torch.fx.Node) -> None:
        size = self._rms(node)
        if size > 0 and abs(size - 1) > BAND:
            self._scaled(node, 1 / size, size, str(node.target))

    def _scaled(self, node: torch.fx.Node, factor: float, size: float, why: str) -> torch.fx.Node:
        """Put a multiplier between ``node`` and all its readers."""
        made = self._call(scale_fwd_bwd, (node, factor, factor), node)
        node.replace_all_uses_with(made, lambda user: user is not made)
        self.multipliers.append(Multiplier(node.name, factor, size, why))
        return self._evaluate(made)

    def _multiplied(self, node: torch.fx.Node, factor: float, size: float, why: str
                    ) -> torch.fx.Node:
        self.multipliers.append(Multiplier(node.name, factor, size, why))
        return self._evaluate(self._call(scale_fwd_bwd, (node, factor, factor), node))

    def _call(self, target: Any, args: tuple[Any, ...], at: torch.fx.Node) -> torch.fx.Node:
        with self.graph.inserting_after(at if at.op != "placeholder" else _last_input(at)):
            made = self.graph.call_function(target, args)
        made.meta = {key: at.meta[key] for key in ("val", *INHERITED) if key in at.meta}
        return made

    def _absorbs(self, node: torch.fx.Node, seen: set[torch.fx.Node]) -> bool:
        """Whether a multiplier on ``node`` ends in a parameter, a norm or a residual sum, on every
        way that its values take."""
        if node in seen:
            return True
        seen.add(node)
        users = [user for user in node.users if user.op != "call_function" or user.users]
        return bool(users) and all(self._takes(user, node, seen) for user in users)

    def _takes(self, user: torch.fx.Node, node: torch.fx.Node, seen: set[torch.fx.Node]) -> bool:
        if user.op != "call_function":
            return False
        if user in self.structure.residuals:
            return user.args[0] is not user.args[1]
        places = [place for place, given in enumerate(user.args) if _holds(given, node)]
        if any(_holds(given, node) for given in user.kwargs.values()):
            return False
        if (product := self.structure.products.get(user)) is not None:
            return places == [product.activation]
        if user.target in _SELECTS:
            return self._absorbs(user, seen)
        rule = rule_for(user.target)
        if rule is None or len(places) != 1:
            return False
        if rule.family == "norm":
            return places == [0]
        if user.target in _JOINS:  # parts of a product's factor, each with columns of its own
            return self._absorbs(user, seen)
        law = rule.law(user)
        passes = law is not None and law.exact and all(
            degrees.get(places[0]) == 1 for degrees in (law.outputs or (law.degrees,)))
        alone = law is not None and not law.follows
        return passes and alone and self._absorbs(user, seen)


_SELECTS: tuple[Any, ...] = (operator.getitem, scale_fwd_bwd)
_JOINS = (aten.cat.default, aten.stack.default)


def _holds(given: Any, node: torch.fx.Node) -> bool:
    found: list[torch.fx.Node] = []
    torch.fx.map_arg(given, found.append)
    return node in found


def _last_input(node: torch.fx.Node) -> torch.fx.Node:
    while node.next.op == "placeholder":
        node = node.next
    return node
