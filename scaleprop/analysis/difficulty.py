"""Quantization difficulty of activations, before and after a transform.

For X [n, K], n tokens by K channels, with channel magnitudes mₖ = ‖X[:, k]‖₂ (the norm over all
tokens)::

    difficulty          D = √( Σₖ (mₖ − m̄)² / (K − 1) )      the standard deviation of the mₖ
    relative_difficulty D / m̄                                 free of the tensor's scale and of n

Uniform channels are easy: one scale over them fits all. D compares what has the same norm, as
before and after a rotation; where a transform changes the norm, as smoothing does, compare the
relative one.

Source: Czakó, Kertész, Szénási, "Turning LLM Activations Quantization-Friendly", arXiv:2506.01967;
the formula is that of the authors' published code (czakop/smooth-rot-exper, ``get_channel_
magnitude_std``). The relative one is ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.fx

from scaleprop.calibration import TensorStatistics, channels
from scaleprop.errors import CalibrationError
from scaleprop.passes.base import Program
from scaleprop.rules import contraction_of

Table = Program | Mapping[str, TensorStatistics]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difficulty:
    """Of one activation; ``after`` and ``relative_after`` are None where nothing was compared.

    name: of two programs, the contraction that reads it; of two tables, its key.
    """

    name: str
    before: float
    relative_before: float
    after: float | None = None
    relative_after: float | None = None


def difficulty(before: Table, after: Table | None = None) -> tuple[Difficulty, ...]:
    """The difficulty of every activation with figures per channel, in the order of ``before``.

    before, after: calibrated programs (``Calibrate(channels=True)``), matched by the name of the
        contraction that reads the activation: what a transform leaves in the graph may stand
        between; or tables of statistics, matched by key.

    Raises:
        CalibrationError: where ``before`` or ``after`` has no figures per channel.
    """
    first = _figures(before)
    second = _figures(after) if after is not None else {}
    return tuple(
        Difficulty(name=name, before=of_norms(norms)[0], relative_before=of_norms(norms)[1],
                   after=of_norms(second[name])[0] if name in second else None,
                   relative_after=of_norms(second[name])[1] if name in second else None)
        for name, norms in first.items())


def of_norms(norms: torch.Tensor) -> tuple[float, float]:
    """``difficulty`` and ``relative_difficulty`` of channel magnitudes [K]; 0 for one channel."""
    return channels.difficulty(norms), channels.relative_difficulty(norms)


def _figures(table: Table) -> dict[str, torch.Tensor]:
    """Name → channel magnitudes."""
    seen = _by_reader(table) if isinstance(table, Program) else dict(table)
    found = {name: one.channels.norm for name, one in seen.items() if one.channels is not None}
    if not found:
        raise CalibrationError("no activation has figures per channel. Remedy: run "
                               "Calibrate(data=..., everything=True, channels=True) first")
    return found


def _by_reader(program: Program) -> dict[str, TensorStatistics]:
    found: dict[str, TensorStatistics] = {}
    for node in program.module.graph.nodes:
        contraction = contraction_of(node)
        operand = contraction.operand("activation") if contraction is not None else None
        if operand is None or contraction is None or contraction.kind not in ("linear", "conv"):
            continue
        source = node.args[operand.argument]
        seen = program.statistics.get(source.name) if isinstance(source, torch.fx.Node) else None
        if seen is not None:
            found[node.name] = seen
    return found
