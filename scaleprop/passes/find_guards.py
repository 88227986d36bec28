"""What tracing assumed of the sizes of a model's inputs, as conditions in those sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch.fx
from torch.export import ExportedProgram

from scaleprop import _torch_compat as compat
from scaleprop.errors import ConfigError
from scaleprop.passes.dimensions import is_symbolic
from scaleprop.passes.guards import Guard


def find_guards(
    exported: ExportedProgram,
    placeholders: Sequence[torch.fx.Node],
    loaded: Sequence[str],
    declared: bool,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Conditions in ``input.shape[axis]``, and those that cannot be told from inputs' sizes.

    Where one is more than ``Guard`` understands, the sizes that it speaks of are those traced.
    Short ones come first: one check often has many consequences, which say less. Sizes that are
    plainly equal are left out: their dimensions have one name.

    loaded: conditions that a file brought along, in torch's spelling: ``L['x'].size()[0] > 4``.
    declared: whether a user gave the dimensions; then their bounds are conditions too. Those that
        tracing inferred follow from the others, and from its assumption that no size is 0 or 1.
    """
    values = [(f"{node.target}.shape[{axis}]", size.node)
              for node in placeholders if isinstance(node.meta.get("val"), torch.Tensor)
              for axis, size in enumerate(node.meta["val"].shape) if is_symbolic(size)]
    sizes = [(name, value.expr) for name, value in values]
    spelling = _spelling(sizes)
    conditions = [*_derived(sizes, spelling), *(_bounds(exported, sizes) if declared else ()),
                  *_traced(exported)]
    spelt = [condition.xreplace(spelling) for condition in conditions]
    texts = [compat.in_python(condition) for condition in spelt if condition != sympy.true]
    guards: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for text in (*texts, *_respelt(loaded, placeholders)):
        try:
            guards[Guard.parse(text).text] = None
        except ConfigError:
            pinned = _as_traced(text, values)
            guards.update(pinned)
            unknown.update({} if pinned else {text: None})
    return tuple(sorted(guards, key=len)), tuple(unknown)


def _as_traced(text: str, values: Sequence[tuple[str, Any]]) -> dict[str, None]:
    """``x.shape[1] == 9`` for every size that a text mentions, by its name or its symbol."""
    words = set(re.findall(r"\w+(?:\.shape\[\d+\])?", text))
    return {f"{name} == {value.hint}": None for name, value in values
            if value.hint is not None and words & {name, *map(str, value.expr.free_symbols)}}


def _spelling(sizes: Sequence[tuple[str, Any]]) -> dict[Any, Any]:
    """Symbol → the size that it is: an input's, or (of 2·s alone) what that size gives for s."""
    found: dict[Any, Any] = {}
    for name, expression in sizes:
        if expression.is_Symbol:
            found.setdefault(expression, compat.size_symbol(name))
    for name, expression in sizes:
        for symbol in expression.free_symbols - found.keys():
            solved = compat.solved_for(expression, compat.size_symbol(name), symbol)
            if solved is not None:
                found[symbol] = solved
    return found


def _derived(sizes: Sequence[tuple[str, Any]], spelling: Mapping[Any, Any]) -> Iterator[Any]:
    """``a == 2*b`` for every size that is an expression of others."""
    for name, expression in sizes:
        if not expression.is_Symbol:
            yield sympy.Eq(compat.size_symbol(name), expression.xreplace(spelling))


def _bounds(exported: ExportedProgram, sizes: Sequence[tuple[str, Any]]) -> Iterator[Any]:
    """Smallest and largest sizes; as torch.export, not that none is 0 or 1."""
    for name, expression in sizes:
        bounds = exported.range_constraints.get(expression)
        size = compat.size_symbol(name)
        if bounds is not None and isinstance(bounds.lower, sympy.Integer) and bounds.lower > 2:
            yield size >= bounds.lower
        if bounds is not None and isinstance(bounds.upper, sympy.Integer):
            yield size <= bounds.upper


def _traced(exported: ExportedProgram) -> Iterator[Any]:
    """What code relied on. Operators also look for special cases, such as sizes of 1 or strides
    that divide: where they found none, they did what is right in general, so that is left out."""
    for condition, is_internal in compat.traced_guards(exported):
        tidied = _tidied(condition)
        if not (is_internal and any(map(_says_ordinary, (condition, tidied)))):
            yield tidied


def _says_ordinary(condition: Any) -> bool:
    """Whether a condition says that two things differ, or that something is not 0 or 1."""
    if isinstance(condition, (sympy.StrictGreaterThan, sympy.StrictLessThan)):
        return condition.lts in (0, 1)
    if isinstance(condition, (sympy.GreaterThan, sympy.LessThan)):
        return condition.lts in (1, 2)
    return isinstance(condition, sympy.Ne)


def _tidied(condition: Any) -> Any:
    """A relation without common factor, with what is subtracted on the other side."""
    if not condition.is_Relational:
        return condition
    terms = sympy.Add.make_args(sympy.expand(condition.lhs - condition.rhs))
    if len(terms) == 1:
        return condition
    try:
        common = abs(sympy.gcd(list(terms)))
        shares = [sympy.cancel(term / common) for term in terms]
    except sympy.BasePolynomialError:  # of a choice between two sizes, for one
        return condition
    negative = [share for share in shares if share.could_extract_minus_sign()]
    return condition.func(sympy.Add(*shares) - sympy.Add(*negative), -sympy.Add(*negative))


def _respelt(loaded: Sequence[str], placeholders: Sequence[torch.fx.Node]) -> Iterator[str]:
    """Texts with ``L['x'].size()[0]`` as ``x.shape[0]``; inputs are named after their path."""
    names = [str(node.target) for node in placeholders]

    def spell(size: re.Match[str]) -> str:
        words = re.findall(r"\w+", size["source"])
        name = names[int(words[1])] if words[0] == "flat_args" else "_".join(words)
        return f"{name}.shape[{size['axis']}]" if name in names else size[0]

    for text in loaded:
        yield re.sub(r"L(?P<source>[\w\[\]'.]+?)\.size\(\)\[(?P<axis>\d+)\]", spell, text)
