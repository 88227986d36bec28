"""What the report knows of one tensor. Passes and backends write these; the report shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Role = Literal["fprop.x", "fprop.w", "bias", "embedding", "output", "other"]
ScaleKind = Literal["weight", "static", "dynamic"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One operand of one operator: what became of it, who decided, and why.

    node, op, operand: where it is: graph node, ATen operator, and the operand's place or name.
    format: name of the scaled format; None where the tensor stayed in high precision.
    scale_kind: how its scale is found: with the weight, calibrated once, or at run time.
    reason: why it stayed high; None where it was quantized.
    sqnr_db: 10·log10(Σx² / Σ(x−x̂)²) in decibels. saturated, underflowed: shares in [0, 1].
    nbytes, nbytes_high: stored bytes in this format, and before.
    lowering: what the backend runs for the operator, e.g. ``MatMulIntegerToFloat u8×s8``.
    """

    node: str
    op: str
    operand: str
    role: Role
    shape: tuple[int | str, ...]
    decided_by: str
    format: str | None = None
    scale_kind: ScaleKind | None = None
    reason: str | None = None
    sqnr_db: float | None = None
    saturated: float | None = None
    underflowed: float | None = None
    nbytes: int | None = None
    nbytes_high: int | None = None
    source: str = ""
    lowering: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformRecord:
    """One transform of channels: where it was put, what took it up, what is left, or why not.

    by: the pass. kind: scale, shift, permute, rotate, …; seed: the value it was asked for.
    members: how many values carry it. absorbed: the parameters that took it up.
    readers: the operators to be quantized that read a transformed value.
    runtime: what is left to do at run time, each with its reason; none where it costs nothing.
    refused: why it was not applied; None where it was.
    """

    by: str
    kind: str
    seed: str
    members: int = 0
    absorbed: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    refused: str | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One chain of methods that was tried, and what it gave on calibration data.

    error: Σ‖y − ŷ‖² / Σ‖y‖² of the model's outputs; local_error: the mean over operators of the
    same of each one's output. operators: those that took this chain in the mixture.
    """

    chain: str
    error: float
    local_error: float
    seconds: float
    operators: tuple[str, ...] = ()
    chosen: bool = False


def transforms_from(items: Iterable[Mapping[str, Any]]) -> tuple[TransformRecord, ...]:
    """The records that ``dataclasses.asdict`` made plain."""
    return tuple(TransformRecord(**_with_tuples(item)) for item in items)


def trials_from(items: Iterable[Mapping[str, Any]]) -> tuple[TrialRecord, ...]:
    """The same of trials."""
    return tuple(TrialRecord(**_with_tuples(item)) for item in items)


def _with_tuples(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
