"""The combinations of a sweep: a base recipe, changed along every axis.

An axis is a key and the values it takes. A key is

    recipe                      which recipe the others change: names, or recipes
    high, convolutions, …       a field of the recipe
    dgrad.dy                    an operand; ``high`` takes it out, a format's name is enough
    dgrad.dy.rounding           a field of an operand
    *.format, wgrad.*.hadamard  that field of every such operand that the recipe has
    fprop.x.format,fprop.w.format   several at once, all the same value

or any name, where values are named too: ``{"rotation": {"none": {changes}, "16": {changes}}}``.
All changes of a combination are made at once: only the recipe that comes out must be valid.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scaleprop.errors import ConfigError, ScalePropError
from scaleprop.recipes.training import OPERANDS, Operand, Phase, TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

Axes = Mapping[str, Sequence[Any] | Mapping[str, Mapping[str, Any]]]

_FIELDS = tuple(field.name for field in dataclasses.fields(Operand))
_OWN = ("high", "convolutions", "phases", "every")  # fields of a recipe that say what it does
_SAYS_NOTHING = ("name", "description", "source", "when")


@dataclasses.dataclass(frozen=True)
class Combination:
    """One value of every axis, by label; the recipe they make, or the reason why there is none."""

    axes: Mapping[str, str]
    recipe: TrainingRecipe | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Value:
    label: str
    changes: Mapping[str, Any]


def combinations(base: TrainingRecipe, axes: Axes) -> list[Combination]:
    """Every combination, the last axis the fastest. One that is no valid recipe has the reason.

    Raises:
        ConfigError: on an axis that changes nothing a recipe has, has no values or alike ones, two
            that change the same, or where no combination is valid.
    """
    if not isinstance(axes, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"axes={axes!r}: a table of axis → values is wanted")
    parsed = {name: _values(name, given) for name, given in axes.items()}
    _check_disjoint(parsed)
    found = [_combination(base, dict(zip(parsed, values, strict=True)))
             for values in itertools.product(*parsed.values())]
    if all(each.recipe is None for each in found):
        raise ConfigError(f"none of {len(found)} combinations is a valid recipe; the first: "
                          f"{found[0].reason}")
    return found


def digest(recipe: TrainingRecipe) -> str:
    """What tells recipes apart that quantize differently; names and descriptions do not."""
    meaning = {key: value for key, value in recipe.to_dict().items() if key not in _SAYS_NOTHING}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:24]


def _combination(base: TrainingRecipe, values: Mapping[str, _Value]) -> Combination:
    labels = {name: value.label for name, value in values.items()}
    changes = [change for value in values.values() for change in value.changes.items()]
    try:
        return Combination(labels, _changed(base, changes))
    except ScalePropError as error:
        return Combination(labels, None, str(error))


def _changed(base: TrainingRecipe, changes: Sequence[tuple[str, Any]]) -> TrainingRecipe:
    """``base`` with all changes made: whole operands before fields of them."""
    recipe, own = base, dict[str, Any]()
    whole, fields = list[tuple[str, Any]](), list[tuple[str, str, Any]]()
    for key, value in changes:
        if key == "recipe":
            recipe = training_recipe(value)
        elif "." not in key:
            own[key] = _own(key, value)
        else:
            pattern, field = _split(key)
            if field:
                fields.append((pattern, field, value))
            else:
                whole.append((pattern, value))
    operands = dict(recipe.operands)
    for pattern, value in whole:
        for role in [pattern] if pattern in OPERANDS else fnmatch.filter(operands, pattern):
            operands.pop(role, None)
            if (operand := as_operand(value)) is not None:
                operands[role] = operand
    return recipe.replace(operands=_with_fields(recipe.name, operands, fields), **own)


def _with_fields(
    name: str, operands: Mapping[str, Operand], fields: Sequence[tuple[str, str, Any]]
) -> dict[str, Operand]:
    """All changes of an operand at once: a rotation's size and its signs are no use one by one."""
    changed: dict[str, dict[str, Any]] = {}
    for pattern, field, value in fields:
        roles = fnmatch.filter(operands, pattern)
        if not roles:
            raise ConfigError(f"recipe {name!r} has no {pattern!r} whose {field!r} could change; "
                              f"it has: {', '.join(operands) or 'no operands'}")
        for role in roles:
            changed.setdefault(role, {})[field] = value
    return {role: dataclasses.replace(operand, **changed.get(role, {}))
            for role, operand in operands.items()}


def as_operand(value: Any) -> Operand | None:
    """An operand from one, from its format's name, or from its fields; None from ``high``.

    Raises:
        ConfigError: for anything else.
    """
    if value is None or value == "high":
        return None
    if isinstance(value, Operand):
        return value
    try:
        return Operand(format=value) if isinstance(value, str) else Operand(**value)
    except TypeError as error:
        raise ConfigError(f"{value!r} is no operand: {error}; an Operand, its fields, a format's "
                          "name or 'high' is") from error


def _own(key: str, value: Any) -> Any:
    if key == "high" and isinstance(value, str):
        return (value,)
    if key == "phases":
        return tuple(each if isinstance(each, Phase) else _phase(each) for each in value)
    return value


def _phase(given: Mapping[str, Any]) -> Phase:
    try:
        return Phase(start=given["start"], operands={
            role: as_operand(value) for role, value in given["operands"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{given!r} is no phase: it has a start and operands") from error


def _split(key: str) -> tuple[str, str]:
    """``dgrad.dy.rounding`` as role and field; no field where the operand itself is meant."""
    role, _, last = key.rpartition(".")
    return (role, last) if last in _FIELDS else (key, "")


def _values(name: str, given: Any) -> list[_Value]:
    """The values of one axis, checked."""
    if isinstance(given, Mapping):
        values = [_group(name, str(label), changes) for label, changes in given.items()]
        keys = [key for value in values for key in value.changes]
    elif isinstance(given, str) or not isinstance(given, Sequence):
        raise ConfigError(f"axis {name!r} is {given!r}: a list of values is wanted, or a table of "
                          "named changes")
    else:
        keys = [key.strip() for key in name.split(",")]
        values = [_Value(label_of(value), dict.fromkeys(keys, value)) for value in given]
    for key in keys:
        _check_key(name, key)
    if not values:
        raise ConfigError(f"axis {name!r} has no values")
    labels = [value.label for value in values]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"axis {name!r} has values that look alike: {', '.join(labels)}. Remedy: "
                          "each once, or named: {label: {changes}}")
    return values


def _group(name: str, label: str, changes: Any) -> _Value:
    if not isinstance(changes, Mapping):
        raise ConfigError(f"axis {name!r}: {label!r} is {changes!r}, not a table of changes such "
                          "as {'dgrad.dy.rounding': 'nearest'}")
    return _Value(label, changes)


def _check_key(axis: str, key: str) -> None:
    """Raise ``ConfigError`` for what no recipe has."""
    if key == "recipe" or key in _OWN:
        return
    if "." in key and fnmatch.filter(OPERANDS, _split(key)[0]):
        return
    raise ConfigError(
        f"axis {axis!r}: nothing of a recipe is called {key!r}; known: recipe, {', '.join(_OWN)}; "
        f"roles {', '.join(OPERANDS)}, with * for any part, and their fields, as in "
        f"'dgrad.dy.rounding': {', '.join(_FIELDS)}")


def _check_disjoint(parsed: Mapping[str, Sequence[_Value]]) -> None:
    """Raise ``ConfigError`` where one axis would undo another."""
    owner: dict[tuple[str, str], str] = {}
    for name, values in parsed.items():
        changed = {each for value in values for key in value.changes for each in _changes(key)}
        for each in sorted(changed):
            if (other := owner.setdefault(each, name)) != name:
                what = ".".join(part for part in each if part)
                raise ConfigError(f"axes {other!r} and {name!r} both change {what}. Remedy: one "
                                  "axis of named changes")


def _changes(key: str) -> Iterator[tuple[str, str]]:
    """(role or field of the recipe, field of the operand) that a key changes."""
    if "." not in key:
        yield key, ""
        return
    pattern, field = _split(key)
    for role in fnmatch.filter(OPERANDS, pattern):
        yield role, field


def label_of(value: Any) -> str:
    """How tables call a value."""
    if value is None:
        return "high"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, TrainingRecipe):
        return value.name
    if isinstance(value, Operand):
        others = [f"{field.name}={label_of(getattr(value, field.name))}"
                  for field in dataclasses.fields(value)
                  if field.name != "format" and getattr(value, field.name) != field.default]
        return " ".join([value.format, *others])
    if isinstance(value, Mapping):
        return " ".join(f"{key}={label_of(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "+".join(map(label_of, value)) or "none"
    return str(value)
