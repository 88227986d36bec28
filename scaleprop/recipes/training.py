"""Training recipes: how each factor of a step's products is quantized, forward and backward.

A linear layer multiplies three times in a step, and each product has two factors, its roles:

    fprop   y = x·wᵀ            fprop.x, fprop.w      summed over a layer's inputs
    dgrad   dx = dy·w           dgrad.dy, dgrad.w     summed over its outputs
    wgrad   dw = dyᵀ·x          wgrad.dy, wgrad.x     summed over tokens

Blocks and rotations lie along the axis that a product sums over, so one value is quantized anew for
each product that reads it; 1-D blocks of a transpose are not the transpose of the blocks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

from scaleprop.errors import ConfigError
from scaleprop.formats import parse
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN
from scaleprop.ops.estimators import check_absmax, parse_estimator
from scaleprop.ops.hadamard import check_block
from scaleprop.ops.operands import check_eden_format, exact_dtype
from scaleprop.ops.steps import signed_float

SCHEMA_VERSION = 1
PRODUCTS = {
    "fprop": ("fprop.x", "fprop.w"),
    "dgrad": ("dgrad.dy", "dgrad.w"),
    "wgrad": ("wgrad.dy", "wgrad.x"),
    "attention": ("attention.x", "attention.dy"),
}
OPERANDS = tuple(role for roles in PRODUCTS.values() for role in roles)
Signs = Literal["none", "fixed", "layer", "step"]
Source = Literal["data", "quantized"]
_SCALING = re.compile(r"current|static|(held|delayed):[1-9]\d*|constant:-?\d+")
_HIGH = re.compile(r"head|router|(first|last):[1-9]\d*")
_FORWARD = ("fprop.x", "fprop.w")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """How one factor of a product is quantized.

    format: a scaled format, see ``scaleprop formats``; or ``bf16``, ``f16``, to round alone.
    rounding: see ``formats.rounding.Rounding``; or ``eden``: to nearest, and the error that is left
        taken out of the block scales, which are rounded stochastically (Quartet II, 2026).
    hadamard: the size of blocks that are rotated before; 0 for none. The other factor of the
        product has the same.
    signs: what random signs come before it: ``none``; a ``fixed`` vector for all layers, of size 16
        that of TransformerEngine, else one drawn; one of each ``layer``'s own; fresh ones each
        ``step``.
    prescale: what data is multiplied by after its scale was found, so that nothing saturates and
        stochastic rounding stays unbiased; the product is divided by it (3/4: arXiv:2502.20586).
    headroom: how many times as large amax is taken when scales are found, for the same (17/16).
    scaling: the scale that the whole tensor has: of the ``current`` data, on each rank of its own;
        those that follow are agreed on by all: ``held:n``, found every n steps; ``delayed:n``, of
        the largest amax of n steps before; ``static``, fixed at the first step, as the solver of
        exponents does; ``constant:e``, 2^e.
    of: the ``data``, or what fprop made of it, in fprop's basis, ``quantized`` once more
        (arXiv:2502.20853; rotated, 2505.14669).
    estimator: whose gradient passes to what was quantized; ``fprop`` roles only.
    """

    format: str
    rounding: str = "nearest"
    hadamard: int = 0
    signs: Signs = "none"
    prescale: float = 1.0
    headroom: float = 1.0
    scaling: str = "current"
    of: Source = "data"
    estimator: str = "ste"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` or ``FormatError`` for a value that is none."""
        if self.format not in PLAIN:
            exact_dtype(self.format)
        if self.rounding != "eden":
            parse_rounding(self.rounding)
        parse_estimator(self.estimator)
        for name, known in (("signs", get_args(Signs)), ("of", get_args(Source))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}; known: {', '.join(known)}")
        if not _SCALING.fullmatch(self.scaling):
            raise ConfigError(f"scaling={self.scaling!r}; known: current, held:<steps>, "
                              "delayed:<steps>, static, constant:<power of two>")
        if self.scaling != "current" and not self._has_tensor_scale:
            raise ConfigError(f"scaling={self.scaling!r}: format {self.format!r} has no scale of "
                              "the whole tensor. Remedy: a format in [tensor], or in two levels")
        if self.hadamard < 0 or (self.signs != "none" and not self.hadamard):
            raise ConfigError(f"hadamard={self.hadamard}, signs={self.signs!r}: signs go with a "
                              "rotation of some size")
        if not 0.0 < self.prescale <= 1.0 or not self.headroom >= 1.0:
            raise ConfigError(f"prescale={self.prescale}, headroom={self.headroom}: at most 1, "
                              "and at least 1")
        if self.hadamard:
            check_block(self.hadamard)
        if self.format in PLAIN:
            self._takes_nothing_else("a format to round to alone", ("format",))
        elif self.rounding == "eden":
            self._takes_nothing_else("eden", ("format", "rounding", "hadamard", "signs", "of"))
            check_eden_format(self.format, self.hadamard)
        elif self.estimator.startswith("absmax"):
            check_absmax(self.format)

    def _takes_nothing_else(self, who: str, names: Collection[str]) -> None:
        """Raise ``ConfigError`` where a field that ``who`` would ignore is not at its default."""
        for field in dataclasses.fields(self):
            if field.name not in names and getattr(self, field.name) != field.default:
                raise ConfigError(f"format={self.format!r}, rounding={self.rounding!r}: {who} has "
                                  f"no {field.name}={getattr(self, field.name)!r}. Remedy: leave "
                                  "that out")

    @property
    def _has_tensor_scale(self) -> bool:
        if self.format in PLAIN:
            return False
        found = parse(self.format)
        return found.two_level or (found.granularity.kind == "tensor"
                                   and found.rule not in ("absmean", "rms"))

    @property
    def stochastic(self) -> bool:
        """Whether it reads random bits."""
        return self.rounding != "nearest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """From step ``start`` on, other operands: those of ``operands``; None for high precision."""

    start: int
    operands: Mapping[str, Operand | None]

    def __post_init__(self) -> None:
        if self.start < 1:
            raise ConfigError(f"a phase starts at step 1 or later, not {self.start}")
        _check_roles("a phase", self.operands)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Operands by role, and what stays high.

    operands: keys of ``OPERANDS``; a role that is absent stays as it is. Factors of attention's
        batched products are ``attention.x``, forward and backward, and ``attention.dy``.
    high: which layers stay high, told from the graph: ``head``, the last products before the loss;
        ``router``, what chooses experts; ``first:n`` and ``last:n``, the products of so many
        residual branches (attention and what follows it are two).
    convolutions: whether they are quantized as linear layers are; not rotated.
    phases: later operands, by the step they start at.
    every: an element format that every floating tensor is truncated to, instead of operands.
    source: the paper or code that it is from.
    when: what it is good for.
    """

    name: str
    description: str
    source: str = ""
    when: str = ""
    operands: Mapping[str, Operand] = dataclasses.field(default_factory=dict[str, Operand])
    high: tuple[str, ...] = ("head",)
    convolutions: bool = False
    phases: tuple[Phase, ...] = ()
    every: str = ""

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for roles and values that do not go together."""
        who = f"recipe {self.name!r}"
        _check_roles(who, self.operands)
        object.__setattr__(self, "high", tuple(self.high))
        object.__setattr__(self, "phases", tuple(self.phases))
        for name in self.high:
            if not _HIGH.fullmatch(name):
                raise ConfigError(f"{who}: high={name!r}; known: head, router, first:<branches>, "
                                  "last:<branches>")
        if self.every:
            signed_float(self.every)
        if self.every and (self.operands or self.phases):
            raise ConfigError(f"{who}: every={self.every!r} leaves no operands to quantize")
        starts = [phase.start for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ConfigError(f"{who}: phases start at {starts}: one after another")
        for phase in (None, *self.phases):
            operands = self.at(phase.start if phase else 0)
            _check_pairs(who, operands)
            if self.convolutions and any(operands[role].hadamard for role in operands
                                         if not role.startswith("attention")):
                raise ConfigError(f"{who}: convolutions sum over positions as well, which "
                                  "rotations do not go through. Remedy: convolutions=False, or "
                                  "hadamard=0")

    def at(self, step: int) -> Mapping[str, Operand]:
        """The operands of one step, counted from 0."""
        found: dict[str, Operand] = dict(self.operands)
        for phase in self.phases:
            if step >= phase.start:
                changed = {**found, **phase.operands}
                found = {role: each for role, each in changed.items() if each is not None}
        return found

    def replace(self, **changes: Any) -> TrainingRecipe:
        """A copy with some fields changed; ``**{"dgrad.dy": operand}`` changes one operand,
        ``**{"dgrad.dy.rounding": "nearest"}`` one of its fields, None takes a role out.

        Raises:
            ConfigError: on an unknown field, or a field of an operand that is not there.
        """
        operands: dict[str, Operand] = dict(changes.pop("operands", self.operands))
        for key in [key for key in changes if "." in key]:
            role, field = ".".join(key.split(".")[:2]), key.split(".")[2:]
            value = changes.pop(key)
            if field:
                value = _changed(self.name, operands, role, field[0], value)
            if value is None:
                operands.pop(role, None)
            else:
                operands[role] = value
        try:
            return dataclasses.replace(self, operands=operands, **changes)
        except TypeError as error:
            raise ConfigError(f"recipe {self.name!r} has no such field: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with ``schema_version``."""
        fields = dataclasses.asdict(self)
        return {"schema_version": SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingRecipe:
        """The recipe that ``to_dict`` wrote.

        Raises:
            ConfigError: on another schema version or an unknown key.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(f"recipe schema_version {version!r}; this version reads "
                              f"{SCHEMA_VERSION}")
        try:
            fields["operands"] = _operands(fields.get("operands", {}))
            fields["phases"] = tuple(Phase(start=phase["start"],
                                           operands=_operands(phase["operands"]))
                                     for phase in fields.get("phases", ()))
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a training recipe: {error}") from error


def _operands(given: Mapping[str, Any]) -> dict[str, Any]:
    return {role: None if each is None else Operand(**each) for role, each in given.items()}


def _changed(
    name: str, operands: Mapping[str, Operand], role: str, field: str, value: Any
) -> Operand:
    if role not in operands:
        raise ConfigError(f"recipe {name!r} has no {role!r} whose {field!r} could change; it has: "
                          f"{', '.join(operands)}")
    if field not in {each.name for each in dataclasses.fields(Operand)}:
        raise ConfigError(f"an operand has no {field!r}; it has: "
                          f"{', '.join(each.name for each in dataclasses.fields(Operand))}")
    return dataclasses.replace(operands[role], **{field: value})


def _check_roles(who: str, operands: Mapping[str, Operand | None]) -> None:
    if unknown := sorted(set(operands) - set(OPERANDS)):
        raise ConfigError(f"{who}: unknown roles {unknown}; known: {', '.join(OPERANDS)}")


def _check_pairs(who: str, operands: Mapping[str, Operand]) -> None:
    """Raise ``ConfigError`` where two factors of a product do not fit, or a role cannot be."""
    for product, roles in PRODUCTS.items():
        rotations = {(each.hadamard, each.signs) if each else (0, "none")
                     for each in map(operands.get, roles)}
        if len(rotations) > 1:
            raise ConfigError(f"{who}: the factors of {product} are rotated differently, "
                              f"{' and '.join(map(str, sorted(rotations)))}: their product would "
                              "be another")
    for role, each in operands.items():
        if each.of == "quantized" and role not in ("dgrad.w", "wgrad.x"):
            raise ConfigError(f"{who}: {role} cannot be of what fprop quantized; dgrad.w and "
                              "wgrad.x can")
        same = operands.get(f"fprop.{role.rpartition('.')[2]}") == each  # read once for both
        if each.estimator != "ste" and role not in _FORWARD and not same:
            raise ConfigError(f"{who}: {role} has no gradient to estimate; {' and '.join(_FORWARD)}"
                              " have")
