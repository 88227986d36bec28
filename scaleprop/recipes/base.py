"""A recipe: which tensor gets which format, and what stays high. Plain, frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from scaleprop.errors import ConfigError
from scaleprop.formats import parse

SCHEMA_VERSION = 1
TOLERANCE = 2.0**-11  # a tenth of what 8-bit formats cost

Scaling = Literal["dynamic", "static"]
Rounding = Literal["nearest", "stochastic", "compensated"]
Clipping = Literal["amax", "mse"]

_CHOICES = {
    "rounding": get_args(Rounding),
    "scaling": get_args(Scaling),
    "clipping": get_args(Clipping),
}
ROLES = ("fprop.w", "fprop.x", "conv.w", "conv.x", "embedding")
_WEIGHTS = ("fprop.w", "conv.w", "embedding")
# (option, value) → the roles that may have it, why the others may not, what to use there
_ONLY_FOR: Mapping[tuple[str, str], tuple[tuple[str, ...], str, str]] = {
    ("rounding", "compensated"): (("fprop.w",), "is for weights of linear operators", "nearest"),
    ("rounding", "stochastic"): (
        _WEIGHTS,
        "is for weights: a compiled program has no source of random bits",
        "nearest",
    ),
    ("clipping", "mse"): (
        _WEIGHTS,
        "is for weights: scales are searched at compile time",
        "amax",
    ),
    ("scaling", "static"): (
        ("fprop.x", "conv.x"),
        "is for activations: a weight's scale is found once, at compile time",
        "dynamic",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """How one operand of an operator is quantized.

    format: name of a scaled format, see ``scaleprop formats``.
    rounding: ``nearest``, ``stochastic`` (weights), or ``compensated``: what one column of a weight
        loses in rounding, later columns make up for (GPTQ, arXiv:2210.17323); ``fprop.w`` only,
        needs calibration.
    scaling: ``dynamic`` finds the scale at run time, ``static`` from calibration (activations).
    clipping: ``amax`` keeps the largest value, ``mse`` searches the scale of least error (weights).
    """

    format: str
    rounding: Rounding = "nearest"
    scaling: Scaling = "dynamic"
    clipping: Clipping = "amax"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` on an unknown format or option."""
        parse(self.format)
        for field, allowed in _CHOICES.items():
            if (value := getattr(self, field)) not in allowed:
                raise ConfigError(f"{field}={value!r}; known: {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats by role.

    roles: keys ``fprop.w``, ``fprop.x``, ``conv.w``, ``conv.x``, ``embedding``; a role that is
        absent stays in high precision.
    tolerance: the largest error that a backend may add to a product for speed, relative to the
        product's largest value.
    source: where formats and method are from.
    when: what it is good for.
    """

    name: str
    description: str
    roles: Mapping[str, Role]
    tolerance: float = TOLERANCE
    source: str = ""
    when: str = ""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.roles) - set(ROLES)):
            raise ConfigError(
                f"recipe {self.name!r}: unknown roles {unknown}; known: {', '.join(ROLES)}"
            )
        if not 0.0 <= self.tolerance < 1.0:
            raise ConfigError(
                f"recipe {self.name!r}: tolerance is a share in [0, 1), not {self.tolerance}"
            )
        for key, role in self.roles.items():
            for (option, value), (allowed, why, remedy) in _ONLY_FOR.items():
                if getattr(role, option) == value and key not in allowed:
                    raise ConfigError(
                        f"recipe {self.name!r}: {option}={value!r} {why} ({', '.join(allowed)}), "
                        f"not for {key!r}; use {remedy!r} there"
                    )

    @property
    def compensates(self) -> bool:
        """Whether some weight is rounded with compensated errors."""
        return any(role.rounding == "compensated" for role in self.roles.values())

    @property
    def needs_calibration(self) -> bool:
        """Whether some activation scale is static, or some weight's rounding compensated."""
        return self.compensates or any(role.scaling == "static" for role in self.roles.values())

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with ``schema_version``."""
        fields = dataclasses.asdict(self)
        return {"schema_version": SCHEMA_VERSION, **fields, "roles": dict(fields["roles"])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that ``to_dict`` wrote.

        Raises:
            ConfigError: on another schema version or an unknown key.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"recipe schema_version {version!r}; this version reads {SCHEMA_VERSION}"
            )
        try:
            fields["roles"] = {key: Role(**value) for key, value in fields["roles"].items()}
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a recipe: {error}") from error
