"""Which passes run, in which order, and how they are spelled on a command line.

A pass is written ``name`` or ``name{option=value, …}``; options are the fields of its dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.auto import Auto
from scaleprop.passes.base import Pass, PassManager
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.finish import Finish
from scaleprop.passes.methods import METHODS
from scaleprop.passes.quantize_activations import QuantizeActivations
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.passes.solve_weights import SolveWeights
from scaleprop.passes.transforms.base import TransformPass
from scaleprop.recipes import Recipe

_PASSES: tuple[type[Pass], ...] = (
    CleanUp,
    Canonicalise,
    AssignFormats,
    *METHODS,
    Auto,
    Calibrate,
    SolveWeights,
    QuantizeWeights,
    QuantizeActivations,
    Finish,
)
# option of a pass → the argument of compile() that sets it
_ARGUMENTS = {
    "recipe": "recipe",
    "exclude": "exclude",
    "include": "include",
    "data": "calibration",
}


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
        pipeline already changes it there: text changes the options that it names, a ``Pass``
        takes its place. ``solve-weights`` runs before ``quantize-weights``; transforms of channels
        run in the order given once formats are assigned, each calibrated anew.

    Raises:
        ConfigError: an unknown pass or option, or one that is an argument of ``compile``.
        CalibrationError: weights are to be rounded with compensation, without calibration.
    """
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # several passes read it, and it can be read only once
    steps: list[Pass] = [
        CleanUp(),
        Canonicalise(),
        AssignFormats(recipe=recipe, exclude=tuple(exclude), include=tuple(include)),
        *([] if calibration is None else [Calibrate(data=calibration, progress=progress)]),
        QuantizeWeights(),
        QuantizeActivations(),
        Finish(),
    ]
    standard = {step.name: step for step in steps}
    inserted: list[Pass] = []
    transforms: list[TransformPass | Auto] = []
    solver: SolveWeights | None = None
    for item in extra:
        last = solver or SolveWeights(data=calibration, progress=progress)
        known = {**standard, last.name: last}
        step = parse_pass(item, known) if isinstance(item, str) else item
        if isinstance(step, SolveWeights):
            solver = step
        elif isinstance(step, (TransformPass, Auto)):
            transforms.append(step)
        elif step.name in standard:
            standard[step.name] = step
        else:
            inserted.append(step)
    if solver is not None:
        passes = _with_solver(standard, solver, calibration)
    else:
        _calibrate_moments(standard, recipe, calibration)
        passes = list(standard.values())
    at = list(standard).index(AssignFormats.name)
    steps = [*passes[:at], *inserted, passes[at], *_calibrated(transforms, calibration, progress),
             *passes[at + 1:]]  # fmt: skip
    return PassManager(steps, verify=verify)


def _calibrated(
    transforms: Sequence[TransformPass | Auto], calibration: Any, progress: bool
) -> Iterator[Pass]:
    """The transforms, with calibration before each one that reads statistics: it drops them."""
    for step in transforms:
        if isinstance(step, Auto):
            data = calibration if step.data is None else step.data
            yield dataclasses.replace(step, data=data, progress=progress or step.progress)
            continue
        needs = step.needs
        if needs.anything:
            if calibration is None:
                raise CalibrationError(
                    f"{step.name} reads what calibration saw. Remedy: pass calibration= (example "
                    "inputs, or a function that calls the model)"
                )
            yield Calibrate(data=calibration, everything=True, progress=progress,
                            channels=needs.channels, sample=needs.sample, moments=needs.moments)
        yield step


def _with_solver(
    standard: dict[str, Pass], solver: SolveWeights, calibration: Any
) -> list[Pass]:
    """The pipeline with ``solver`` in its place; it reads the data once more."""
    weights, calibrate = standard[QuantizeWeights.name], standard.get(Calibrate.name)
    data: Any = calibration if solver.data is None else solver.data
    if data is None:
        raise CalibrationError(
            "solve-weights weighs errors by what calibration saw. Remedy: pass calibration= "
            "(example inputs without padding, or a function that calls the model)"
        )
    if isinstance(weights, QuantizeWeights):
        if weights.rounding is not None:
            raise ConfigError(
                f"quantize-weights{{rounding={weights.rounding}}} contradicts solve-weights, which "
                "rounds the same weights. Remedy: leave one of them out"
            )
        solver = dataclasses.replace(solver, clipping=solver.clipping or weights.clipping)
    if isinstance(calibrate, Calibrate):
        if isinstance(data, Iterator) and data is calibrate.data:
            data = list(data)  # an iterator can be read only once
            calibrate = dataclasses.replace(calibrate, data=data)
        standard[Calibrate.name] = dataclasses.replace(
            calibrate, moments=bool(calibrate.moments))
    passes = list(standard.values())
    at = list(standard).index(QuantizeWeights.name)
    return [*passes[:at], dataclasses.replace(solver, data=data), *passes[at:]]


def _calibrate_moments(standard: dict[str, Pass], recipe: Recipe, calibration: Any) -> None:
    """Let calibration keep the second moments that compensated rounding needs."""
    moments = _wants_moments(standard[QuantizeWeights.name])
    if calibration is None and (
        recipe.compensates if moments is None else moments and "fprop.w" in recipe.roles
    ):
        raise CalibrationError(
            f"recipe {recipe.name!r}: rounding='compensated' weighs errors by what calibration "
            "saw. Remedy: pass calibration= (example inputs without padding, or a function that "
            "calls the model), or passes=['quantize-weights{rounding=nearest}']"
        )
    calibrate = standard.get(Calibrate.name)
    if isinstance(calibrate, Calibrate) and calibrate.moments is None:
        standard[Calibrate.name] = dataclasses.replace(calibrate, moments=moments)


def _wants_moments(weights: Pass) -> bool | None:
    """Whether the pass overrides which weights are compensated; None: as the recipe says."""
    rounding = weights.rounding if isinstance(weights, QuantizeWeights) else None
    return None if rounding is None else rounding == "compensated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassInfo:
    """A pass for people: what it does, its options with their defaults."""

    name: str
    summary: str
    preserves_function: bool
    options: tuple[tuple[str, str, str], ...]


def pass_types() -> tuple[type[Pass], ...]:
    """Every pass that has a name on the command line, in the order in which they usually run."""
    return _PASSES


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
                if field.name not in _ARGUMENTS
            ),
        )
        for kind in _PASSES
    )


def _default_text(field: dataclasses.Field[Any]) -> str:
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def parse_pass(text: str, standard: Mapping[str, Pass] | None = None) -> Pass:
    """The pass that ``name{option=value, …}`` spells.

    Values are JSON where that parses (``true``, ``0.5``, ``["a"]``), else plain text.
    standard: name → a pass whose options hold where ``text`` gives none.

    Raises:
        ConfigError: unknown pass or option, a value that the option does not take, or an option
            that is an argument of ``compile``.
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
    return _construct(known[name], _options(name, body), (standard or {}).get(name))


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


def _construct(kind: type[Pass], options: dict[str, Any], standard: Pass | None) -> Pass:
    hints = get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(
                f"pass {kind.name!r} has no option {key!r}; it has: {', '.join(fields) or 'none'}"
            )
        if key in _ARGUMENTS:
            raise ConfigError(
                f"pass {kind.name!r}: {key} is no option here; pass it to compile(), "
                f"as {_ARGUMENTS[key]}="
            )
        if hints[key] in (bool, int) and type(value) is not hints[key]:
            raise ConfigError(f"pass {kind.name!r}: {key}={value!r} is not {hints[key].__name__}")
        if isinstance(value, list):
            options[key] = tuple(value)
        elif (choices := _choices(hints[key])) and value not in choices:
            raise ConfigError(f"pass {kind.name!r}: {key}={value!r}; known: {choices}")
    try:
        return kind(**options) if standard is None else dataclasses.replace(standard, **options)
    except TypeError as error:
        raise ConfigError(f"pass {kind.name!r}: {error}") from error


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a ``Literal`` (or an optional one) allows; () for other types."""
    if str(get_origin(hint)) == "typing.Literal":
        return get_args(hint)
    inner = [_choices(part) for part in get_args(hint) if part is not type(None)]
    found = tuple(value for values in inner for value in values)
    return (*found, None) if found and type(None) in get_args(hint) else found
