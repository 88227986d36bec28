"""Conditions on sizes that a captured graph relies on: ``2*b.shape[0] == a.shape[0]``.

Code that branches on a size, or that reshapes to one, is traced for the sizes of the example. What
tracing found on the way is kept as text: an ``input.shape[axis]`` is a size, the rest arithmetic
and comparisons. Text can be saved and reported; reading it never runs it.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaleprop.errors import ConfigError

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.Not: operator.not_,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "round": round, "math.ceil": math.ceil,
    "math.floor": math.floor, "math.trunc": math.trunc, "torch.sym_float": float,
}  # fmt: skip

Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Guard:
    """One condition; ``sizes`` are the (input, axis) that it speaks of, in order."""

    text: str
    sizes: tuple[tuple[str, int], ...]
    _holds: Callable[[Shapes], Any] = dataclasses.field(repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> Guard:
        """The condition that ``text`` spells.

        Raises:
            ConfigError: where it is not one.
        """
        sizes: list[tuple[str, int]] = []
        try:
            tree = ast.parse(text, mode="eval").body
            holds = _compiled(tree, sizes)
        except (SyntaxError, TypeError) as error:
            raise ConfigError(f"{text!r} is not a condition on sizes: {error}") from error
        return cls(ast.unparse(tree), tuple(dict.fromkeys(sizes)), holds)

    def check(self, shapes: Shapes) -> None:
        """Raise ``ConfigError`` where inputs of these shapes are not what the graph is for."""
        if self.holds(shapes):
            return
        found = ", ".join(f"dimension {axis} of input {name!r} is {shapes[name][axis]}"
                          for name, axis in self.sizes)
        raise ConfigError(
            f"{found}, but the model was captured for {self.text}; "
            f"compile again with example inputs of the size that is wanted, or with "
            f"dynamic_shapes={{}} for this size alone"
        )

    def holds(self, shapes: Shapes) -> bool:
        """Whether the condition is met; one that cannot be computed, as it divides by zero,
        is not."""
        try:
            return bool(self._holds(shapes))
        except (ArithmeticError, TypeError, ValueError):
            return False


def arithmetic(text: str, dimensions: Mapping[str, Any]) -> Any:
    """What ``2*batch + 1`` is where the dimension ``batch`` has a size.

    Raises:
        ConfigError: where it speaks of something else.
    """
    found = Guard.parse(re.sub(r"[^\W\d]\w*", r"\g<0>.shape[0]", text))
    if unknown := [name for name, _ in found.sizes if name not in dimensions]:
        raise ConfigError(f"{text!r}: no dimension is called {unknown[0]!r}")
    return found._holds({name: (size,) for name, size in dimensions.items()})  # pyright: ignore[reportPrivateUsage]


def _compiled(tree: ast.expr, sizes: list[tuple[str, int]]) -> Callable[[Shapes], Any]:
    """``tree`` as a function of the shapes; what it may be is listed here, and nothing else."""

    def inner(part: ast.expr) -> Callable[[Shapes], Any]:
        return _compiled(part, sizes)

    match tree:
        case ast.Constant(value=int() | float() as number):
            return lambda _: number
        case ast.Subscript(value=ast.Attribute(value=ast.Name(id=name), attr="shape"),
                           slice=ast.Constant(value=int() as axis)):
            sizes.append((name, axis))
            return lambda shapes: shapes[name][axis]
        case ast.Compare(left=first, ops=kinds, comparators=rest):
            terms = [inner(term) for term in (first, *rest)]
            checks = [_operator(kind) for kind in kinds]
            return lambda shapes: all(
                check(left(shapes), right(shapes))
                for check, left, right in zip(checks, terms, terms[1:], strict=False))
        case ast.BoolOp(op=kind, values=parts):
            terms = [inner(part) for part in parts]
            quantifier = all if isinstance(kind, ast.And) else any
            return lambda shapes: quantifier(term(shapes) for term in terms)
        case ast.UnaryOp(op=kind, operand=operand):
            parts = [operand]
            apply = _operator(kind)
        case ast.BinOp(left=left, op=kind, right=right):
            parts = [left, right]
            apply = _operator(kind)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            is_met, yes, no = inner(test), inner(body), inner(orelse)
            return lambda shapes: (yes if is_met(shapes) else no)(shapes)
        case ast.Call(func=function, args=parts, keywords=[]) if (
            ast.unparse(function) in _FUNCTIONS
        ):
            apply = _FUNCTIONS[ast.unparse(function)]
        case _:
            raise TypeError(ast.unparse(tree))
    terms = [inner(part) for part in parts]
    return lambda shapes: apply(*[term(shapes) for term in terms])


def _operator(kind: ast.AST) -> Callable[..., Any]:
    if type(kind) not in _OPERATORS:
        raise TypeError(type(kind).__name__)
    return _OPERATORS[type(kind)]
