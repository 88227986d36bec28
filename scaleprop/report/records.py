"""What the report knows of one tensor. Passes and backends write these; the report shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Role = Literal["fprop.x", "fprop.w", "bias", "embedding", "output", "other"]
ScaleKind = Literal["weight", "static", "dynamic"]


def _no_counts() -> dict[int, int]:
    return {}


def _no_figures() -> dict[str, float]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    """What the numbers of a tensor are, in the model's own units; of a quantized weight, those that
    are stored, x̂.

    count: how many were looked at. amax, rms, mean, and kurtosis (3 for a normal; None where all
    are the same or there are none): of the finite ones. zeros, nonfinite: shares in [0, 1].
    exponents: ⌊log2 |x|⌋ → count, of finite values other than 0. scaled: the same of x / scale, by
    the tensor's own scales in its format; empty where it stayed high. scales: the least and the
    greatest scale. predicted: RMS by the operators' rules; None where nothing is known of it.
    """

    count: int
    amax: float
    rms: float
    mean: float
    kurtosis: float | None = None
    zeros: float = 0.0
    nonfinite: float = 0.0
    exponents: Mapping[int, int] = dataclasses.field(default_factory=_no_counts)
    scaled: Mapping[int, int] = dataclasses.field(default_factory=_no_counts)
    scales: tuple[float, float] | None = None
    predicted: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleProvenance:
    """Where the scale of a tensor is from.

    by: the pass that found it, or has the backend find it. statistic: of which numbers, e.g. ``amax
    of each 1×32 block``. batches: how many calibration batches they were; None where no
    calibration was used. value: the graph value whose numbers they are. neighbours: values and
    parameters that carry the same scale, or that a transform moved scales to or from.
    """

    by: str
    statistic: str
    batches: int | None = None
    value: str = ""
    neighbours: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """One operand of one operator: what became of it, who decided, and why.

    node, op, operand: where it is: graph node, ATen operator, and the operand's place or name.
    module: dotted path of the module that the operator is in. source: line of the model's source.
    format: name of the scaled format; None where the tensor stayed in high precision.
    scale_kind: how its scale is found: with the weight, calibrated once, or at run time.
    reason: why it stayed high; None where it was quantized.
    sqnr_db: 10·log10(Σx² / Σ(x−x̂)²) in decibels. saturated, underflowed: shares in [0, 1].
    nbytes, nbytes_high: stored bytes in this format, and before.
    lowering: what the backend runs for the operator, e.g. ``MatMulIntegerToFloat u8×s8``.
    values: what its numbers are. provenance: where its scale is from.
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
    module: str = ""
    values: Values | None = None
    provenance: ScaleProvenance | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformRecord:
    """One transform of channels: where it was put, what took it up, what is left, or why not.

    by: the pass. kind: scale, shift, permute, rotate, …; seed: the value it was asked for.
    members: how many values carry it. absorbed: the parameters that took it up.
    readers: the operators to be quantized that read a transformed value.
    runtime: what is left to do at run time, each with its reason; none where it costs nothing.
    refused: why it was not applied; None where it was.
    before, after: measure → number, of the activations that ``readers`` read, in the model that was
    given and in the one that was made, on the example inputs; of several, the worst. ``kurtosis``;
    ``difficulty`` and ``relative_difficulty``: see ``analysis.difficulty``; ``sqnr_db`` in the
    readers' format, where its scales are found at run time. Empty where nothing reads one, and
    ``before`` where that model is gone.
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
    before: Mapping[str, float] = dataclasses.field(default_factory=_no_figures)
    after: Mapping[str, float] = dataclasses.field(default_factory=_no_figures)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What one recipe made of the model, for a comparison of several.

    nbytes: stored bytes of parameters and buffers; size_ratio: ÷ those before. speed: median time
    of the model that was given ÷ that of this one, runs interleaved; None where not timed.
    fidelity: measure → number against the model that was given.
    """

    recipe: str
    backend: str
    nbytes: int
    size_ratio: float | None = None
    speed: float | None = None
    fidelity: Mapping[str, float] = dataclasses.field(default_factory=_no_figures)
