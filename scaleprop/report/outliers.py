"""What is known of a model's outliers: where, how large, how often, and what they cost.

JSON, the key ``outliers`` of a report: an object with the fields of ``OutlierTable``, lists of
objects with the fields of ``Outlier``, ``Profile`` and ``AttentionProfile``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

OutlierKind = Literal["activation channel", "activation token", "massive activation",
                      "weight row", "weight column", "attention sink"]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outlier:
    """The outliers of one kind in one tensor.

    node, op, source: the value (of a weight: its name), what makes it, the user's line.
    indices: the largest first, at most ``LISTED``: channels, tokens (positions in the sequence;
        keys for attention), rows or columns. sizes: of each, as a multiple of what is usual.
    shares: of each: how often, in [0, 1]: of rows, sequences or elements.
    count: how many there are. detail: what the kind has besides, as a phrase.
    """

    kind: OutlierKind
    node: str
    op: str
    source: str
    indices: tuple[int, ...]
    sizes: tuple[float, ...]
    shares: tuple[float, ...]
    count: int
    detail: str = ""

    @property
    def size(self) -> float:
        """The largest multiple of what is usual."""
        return max(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """How one activation's channels are spread.

    node, op, source: the value; reader: the contraction that reads it, and ``layer`` its kind.
    channels: how many; amax: the largest magnitude of each, [channels], or of as many groups of
        neighbours as ``DRAWN``. outliers: the channels that are.
    kurtosis: of all elements; channel_kurtosis: mean of the channels'. 3 for Gaussians.
    difficulty, relative_difficulty: see ``analysis.difficulty``; after, relative_after: the same
        after a transform; None where there was none.
    """

    node: str
    op: str
    source: str
    reader: str
    layer: str
    channels: int
    amax: tuple[float, ...]
    outliers: tuple[int, ...]
    kurtosis: float
    channel_kurtosis: float
    difficulty: float
    relative_difficulty: float
    after: float | None = None
    relative_after: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionProfile:
    """How much attention the keys of one attention receive.

    received: share of all attention per key position, mean over sequences, heads and queries; or
        of as many groups of neighbours as ``DRAWN``, the largest of each. keys: how many.
    value_norms: mean ‖v‖ per key position, as a multiple of the sequence's median; () where the
        values were not found.
    """

    node: str
    source: str
    keys: int
    received: tuple[float, ...]
    value_norms: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutlierTable:
    """Everything that the detector found, largest first; what it could not judge is in notes."""

    outliers: tuple[Outlier, ...] = ()
    profiles: tuple[Profile, ...] = ()
    attention: tuple[AttentionProfile, ...] = ()
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: OutlierKind) -> tuple[Outlier, ...]:
        """The outliers of one kind."""
        return tuple(outlier for outlier in self.outliers if outlier.kind == kind)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OutlierTable:
        """The table that ``to_dict`` wrote; KeyError, TypeError or ValueError for other data."""
        return cls(
            outliers=tuple(_restored(Outlier, item) for item in data["outliers"]),
            profiles=tuple(_restored(Profile, item) for item in data["profiles"]),
            attention=tuple(_restored(AttentionProfile, item) for item in data["attention"]),
            notes=tuple(data["notes"]))


LISTED = 16  # indices that one entry names
DRAWN = 256  # points of a profile: longer ones keep the largest of neighbours


def worst_first(
    profiles: Sequence[Profile], figure: str = "relative_difficulty"
) -> list[Profile]:
    """By one of their figures, the largest first; what has none comes last."""
    def place(profile: Profile) -> float:
        value: float = getattr(profile, figure)
        return -value if math.isfinite(value) else math.inf

    return sorted(profiles, key=place)


def grouped(values: Sequence[float], limit: int = DRAWN) -> tuple[float, ...]:
    """``values`` where they are at most ``limit``, else the largest of equal runs of them."""
    if len(values) <= limit:
        return tuple(values)
    run = math.ceil(len(values) / limit)
    return tuple(max(values[i : i + run]) for i in range(0, len(values), run))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


_SERIES = frozenset(("amax", "sizes", "shares", "received", "value_norms"))
_FIGURES = frozenset(("kurtosis", "channel_kurtosis", "difficulty", "relative_difficulty", "after",
                      "relative_after"))


def _restored(kind: type[Any], item: Mapping[str, Any]) -> Any:
    def restored(key: str, value: Any) -> Any:
        if key in _SERIES:
            return tuple(map(float, value))
        if isinstance(value, list):
            return tuple(cast(list[Any], value))
        return float(value) if key in _FIGURES and value is not None else value

    return kind(**{key: restored(key, value) for key, value in item.items()})
