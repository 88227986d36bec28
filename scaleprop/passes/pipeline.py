"""Which passes run, in which order, and how they are spelled on a command line.

A pass is written ``name`` or ``name{option=value, …}``; options are the fields of its dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.base import Pass, PassManager
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.finish import Finish
from scaleprop.passes.quantize_activations import QuantizeActivations
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes import Recipe, named_recipe

_PASSES: tuple[type[Pass], ...] = (
    CleanUp,
    Canonicalise,
    AssignFormats,
    Calibrate,
    QuantizeWeights,
    QuantizeActivations,
    Finish,
)


def build(
    recipe: Recipe,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    calibration: Iterable[Any] | Callable[[Any], Any] | None = None,
    extra: Sequence[str | Pass] = (),
    verify: bool = False,
    progress: bool = False,
) -> PassManager:
    """The passes that take a captured program to ``recipe``.

    extra: passes to run on the canonical graph, before formats are assigned. One that is in the
        pipeline already replaces it there, with its options.

    Raises:
        CalibrationError: weights are to be rounded with compensation, without calibration.
    """
    given = [parse_pass(item) if isinstance(item, str) else item for item in extra]
    replaced = {step.name: step for step in given}
    weights = replaced.get(QuantizeWeights.name, QuantizeWeights())
    moments = _wants_moments(weights)
    if calibration is None and (
        recipe.compensates if moments is None else moments and "fprop.w" in recipe.roles
    ):
        raise CalibrationError(
            f"recipe {recipe.name!r}: rounding='compensated' weighs errors by what calibration "
            "saw. Remedy: pass calibration= (example inputs without padding, or a function that "
            "calls the model), or passes=['quantize-weights{rounding=nearest}']"
        )
    before: list[Pass] = [CleanUp(), Canonicalise()]
    after: list[Pass] = [
        AssignFormats(recipe=recipe, exclude=tuple(exclude), include=tuple(include)),
        *(
            [Calibrate(data=calibration, progress=progress, moments=moments)]
            if calibration is not None
            else []
        ),
        weights,
        QuantizeActivations(),
        Finish(),
    ]
    standard = {step.name for step in (*before, *after)}
    inserted = [step for step in given if step.name not in standard]
    passes = [
        *(replaced.get(step.name, step) for step in before),
        *inserted,
        *(replaced.get(step.name, step) for step in after),
    ]
    return PassManager(passes, verify=verify)


def _wants_moments(weights: Pass) -> bool | None:
    """Whether the pass overrides which weights are compensated; None: as the recipe says."""
    rounding = weights.rounding if isinstance(weights, QuantizeWeights) else None
    return None if rounding is None else rounding == "compensated"


def pass_names() -> tuple[str, ...]:
    """The passes that exist, in the order in which they usually run."""
    return tuple(kind.name for kind in _PASSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassInfo:
    """A pass for people: what it does, its options with their defaults."""

    name: str
    summary: str
    preserves_function: bool
    options: tuple[tuple[str, str, str], ...]


def describe_passes() -> tuple[PassInfo, ...]:
    """One entry per pass; options are (name, type, default or ``required``)."""
    return tuple(
        PassInfo(
            name=kind.name,
            summary=(kind.__doc__ or "").strip().splitlines()[0],
            preserves_function=kind.preserves_function,
            options=tuple(
                (field.name, str(field.type), _default_text(field))
                for field in dataclasses.fields(kind)
            ),
        )
        for kind in _PASSES
    )


def _default_text(field: dataclasses.Field[Any]) -> str:
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def parse_pass(text: str) -> Pass:
    """The pass that ``name{option=value, …}`` spells.

    Values are JSON where that parses (``true``, ``0.5``, ``["a"]``), else plain text.

    Raises:
        ConfigError: unknown pass or option, or a value that the option does not take.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\{(.*)\})?\s*", text, re.DOTALL)
    if match is None:
        raise ConfigError(f"cannot read pass {text!r}; write name or name{{option=value}}")
    name, body = match[1], match[2] or ""
    known = {kind.name: kind for kind in _PASSES}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=2)
        meant = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ConfigError(f"unknown pass {name!r}; {meant}known: {', '.join(known)}")
    return _construct(known[name], _options(name, body))


def _options(name: str, body: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    # a comma inside brackets belongs to a value
    for item in re.split(r",(?![^\[]*\])", body):
        if not item.strip():
            continue
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"pass {name!r}: cannot read option {item.strip()!r}; use key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _construct(kind: type[Pass], options: dict[str, Any]) -> Pass:
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(
                f"pass {kind.name!r} has no option {key!r}; it has: {', '.join(fields) or 'none'}"
            )
        if hints[key] is Recipe:
            options[key] = named_recipe(value)
        elif hints[key] in (bool, int) and type(value) is not hints[key]:
            raise ConfigError(f"pass {kind.name!r}: {key}={value!r} is not {hints[key].__name__}")
        elif isinstance(value, list):
            options[key] = tuple(value)
        elif (choices := _choices(hints[key])) and value not in choices:
            raise ConfigError(f"pass {kind.name!r}: {key}={value!r}; known: {choices}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"pass {kind.name!r}: {error}") from error


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a ``Literal`` (or an optional one) allows; () for other types."""
    if str(get_origin(hint)) == "typing.Literal":
        return get_args(hint)
    inner = [_choices(part) for part in get_args(hint) if part is not type(None)]
    found = tuple(value for values in inner for value in values)
    return (*found, None) if found and type(None) in get_args(hint) else found
