"""The outlier detector: activations, weights and attention, over calibration data.

After An et al., "Systematic Outliers in Large Language Models" (arXiv:2502.06415), who compare with
what is usual in the same tensor, sequence by sequence (here batch by batch). Per tensor:

massive activation   |x| > 1000 · mean |x|: the paper's activation outlier, by its published code.
activation channel   ‖x_k‖₂ > 6 · the median channel's: a channel that is large throughout, as
                     smoothing removes it. Its largest value says less: a norm bounds it by √K. 6 is
                     the bound of LLM.int8() (arXiv:2208.07339), there for values of unit size.
                     Size: the ratio. Share: of rows in which the channel is larger than the median
                     channel ever is.
activation token     u_t > 20 · the median token's, with u_t = max_k |x_tk| / s_k and s_k what nine
                     tenths of the channel's |x_k| stay below, at least the median channel's: a
                     token that is large for its channels, so that large channels make none.
weight row, column   max |w| > 6 · the median row's or column's. The paper compares a row's maximum
                     with the row's mean, which hides a row that is large all over.
attention sink       see ``analysis.attention``.

Zero rows, columns and channels (padding, dead units) are no yardstick: medians are of the others.
Tensors with fewer than 8 rows or channels are not judged. Activations are those that linears,
convolutions and the scores of attention read. Everything is found by operator, nothing by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.analysis.attention import AttentionTally, attentions, describe_short
from scaleprop.analysis.difficulty import difficulty, of_norms
from scaleprop.calibration.observer import Tally
from scaleprop.errors import source_line
from scaleprop.passes.base import Pass, PassManager, Program
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise.attention import products_around
from scaleprop.report.outliers import (
    LISTED,
    AttentionProfile,
    Outlier,
    OutlierKind,
    OutlierTable,
    Profile,
    grouped,
)
from scaleprop.rules import contraction_of

_FEW = 8  # rows or channels below which a median says little
_FEW_TOKENS = 16  # a token in each sequence must be less than a tenth of all
_ROWS = 256  # rows that a channel's quantile is taken of
_MASSIVE = 64  # elements that are located per batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteria:
    """From where on something is an outlier, as a multiple of what is usual; see the module.

    element, channel, token, weight: ratios. attention: share of all attention; uniform: and of
    what the mask alone would give. drain: a sink's ‖v‖ over the median's, at most.
    """

    element: float = 1000.0
    channel: float = 6.0
    token: float = 20.0
    weight: float = 6.0
    attention: float = 0.1
    uniform: float = 4.0
    drain: float = 1 / 3


class Detector:
    """Watches a canonical program while it runs on calibration data; ``table`` is what it found.

    watched, calls: for an ``Observer``.
    """

    def __init__(self, program: Program, criteria: Criteria | None = None) -> None:
        self.criteria = criteria or Criteria()
        self._program = program
        self._activations = {
            source.name: _Activation(source, reader, layer, axis, self.criteria)
            for source, reader, layer, axis in _read(program.module.graph)}
        self.watched = {name: found.add for name, found in self._activations.items()}
        self._attentions, self.calls = attentions(program.module.graph, self._tally)

    def _tally(self, node: torch.fx.Node) -> AttentionTally:
        bounds = self.criteria
        return AttentionTally(node, bounds.attention, bounds.uniform, bounds.drain)

    def table(self) -> OutlierTable:
        """Everything found in what was watched, and in the weights."""
        outliers = [found for activation in self._activations.values()
                    for found in activation.outliers()]
        outliers += weight_outliers(self._program, self.criteria.weight)
        outliers += [found for tally in self._attentions if (found := _sinks(tally))]
        profiles = [profile for activation in self._activations.values()
                    if (profile := activation.profile()) is not None]
        return OutlierTable(
            outliers=tuple(sorted(outliers, key=lambda outlier: -outlier.size)),
            profiles=tuple(profiles),
            attention=tuple(map(_attention_profile, self._attentions)),
            notes=tuple(describe_short(tally) for tally in self._attentions if tally.short))


def _read(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, torch.fx.Node, str, int]]:
    """Values that contractions sum over channels, with the first reader, its kind and the axis."""
    scores = {products[0] for node in graph.nodes
              if (products := products_around(node)) is not None}
    found: dict[torch.fx.Node, tuple[torch.fx.Node, torch.fx.Node, str, int]] = {}
    for node in graph.nodes:
        contraction = contraction_of(node)
        if contraction is None or (contraction.kind == "matmul" and node not in scores):
            continue
        operands = contraction.operands
        if contraction.kind == "attention":
            operands = operands[:2]  # values are summed over tokens
        for operand in operands:
            source: Any = node.args[operand.argument] if operand.argument < len(node.args) else None
            if operand.role == "activation" and operand.axes and isinstance(source, torch.fx.Node) \
                    and source.op != "get_attr":
                kind = "attention" if contraction.kind == "matmul" else contraction.kind
                found.setdefault(source, (source, node, kind, operand.axes[0]))
    return list(found.values())


def with_difficulty_after(
    table: OutlierTable, program: Program, steps: Sequence[Pass], data: Any
) -> OutlierTable:
    """``table`` with the difficulty that each activation has after ``steps``.

    The steps get statistics, samples included; what they change is measured on ``data`` again.
    """
    measure = Calibrate(data=data, everything=True, channels=True, sample=256)
    before = measure.run(program).program
    changed = PassManager(steps).run(before)
    after = measure.run(changed).program
    found = {one.name: one for one in difficulty(before, after)}
    return dataclasses.replace(table, profiles=tuple(
        dataclasses.replace(profile, after=found[profile.reader].after,
                            relative_after=found[profile.reader].relative_after)
        if profile.reader in found else profile for profile in table.profiles))


class _Activation:
    """One activation: statistics per channel, and what each batch had of outliers."""

    def __init__(
        self, node: torch.fx.Node, reader: torch.fx.Node, layer: str, axis: int, criteria: Criteria
    ) -> None:
        self.node, self.reader, self.layer, self.axis = node, reader, layer, axis
        self._criteria = criteria
        self._tally = Tally(axis=axis, channels=True)
        self._exceeding = torch.zeros(0)  # [K], rows in which a channel exceeds the usual amax
        self._rows = 0
        self._tokens, self._sequences, self._token_size = (torch.zeros(0) for _ in range(3))
        self._massive: dict[tuple[int, int], tuple[float, int]] = {}  # (channel, token): size, hits
        self._batches = 0
        self._generator = torch.Generator().manual_seed(0)

    def add(self, value: torch.Tensor) -> None:
        """Count one batch."""
        if not value.is_floating_point() or value.dim() < -self.axis or value.numel() == 0:
            return
        self._tally.add(value)
        x = value.detach().float().movedim(self.axis, -1).abs()
        rows = x.reshape(-1, x.shape[-1])
        if min(rows.shape) < _FEW:
            return
        usual = _median(rows.amax(0))
        exceeding = (rows > usual).sum(0).cpu()
        if self._exceeding.numel() not in (0, exceeding.numel()):
            return  # the channels are not the same ones
        self._exceeding = exceeding if not self._rows else self._exceeding + exceeding
        self._rows += rows.shape[0]
        self._batches += 1
        has_tokens = self.axis == -1 and x.dim() > 2
        self._add_massive(rows, x.shape[-2] if has_tokens else 0)
        if has_tokens and x.shape[-2] >= _FEW_TOKENS:
            self._add_tokens(x.reshape(-1, *x.shape[-2:]))

    def _add_massive(self, rows: torch.Tensor, tokens: int) -> None:
        mean = float(rows.mean())
        bound = self._criteria.element * mean
        if not mean or float(rows.max()) <= bound:
            return
        sizes, places = rows.flatten().topk(min(_MASSIVE, rows.numel()))
        batch: dict[tuple[int, int], float] = {}
        for size, place in zip(sizes.tolist(), places.tolist(), strict=True):
            if size > bound:
                row, channel = divmod(place, rows.shape[1])
                batch.setdefault((channel, row % tokens if tokens else -1), size / mean)
        for key, size in batch.items():
            largest, hits = self._massive.get(key, (0.0, 0))
            self._massive[key] = (max(largest, size), hits + 1)

    def _add_tokens(self, x: torch.Tensor) -> None:
        """x: [sequence, token, channel], magnitudes."""
        rows = x.flatten(0, 1)
        if rows.shape[0] <= _ROWS:
            some = rows
        else:  # drawn: every so many would be the same token of each sequence
            draw = torch.randint(rows.shape[0], (_ROWS,), generator=self._generator)
            some = rows[draw.to(rows.device)]
        usual = some.kthvalue(math.ceil(0.9 * some.shape[0]), dim=0).values
        least = _median(usual)
        if not least:
            return  # nine tenths of all are zero: nothing is usual
        large = (x / usual.clamp_min(least)).amax(-1).cpu()
        ratio = large / _median(large)
        tokens = ratio.shape[1]
        grown = tokens - self._tokens.numel()
        if grown > 0:
            self._tokens, self._sequences, self._token_size = (
                torch.cat([held, torch.zeros(grown)])
                for held in (self._tokens, self._sequences, self._token_size))
        self._tokens[:tokens] += (ratio > self._criteria.token).sum(0)
        self._sequences[:tokens] += ratio.shape[0]
        self._token_size[:tokens] = torch.maximum(self._token_size[:tokens], ratio.amax(0))

    def channels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the outlier channels, largest first, and their sizes."""
        seen = self._tally.total
        if seen is None or seen.channels is None or not self._rows:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0)
        return _large(seen.channels.norm.float().cpu(), self._criteria.channel)

    def outliers(self) -> list[Outlier]:
        """At most one of each kind."""
        found: list[Outlier] = []
        channels, sizes = self.channels()
        if channels.numel():
            found.append(self._outlier("activation channel", channels, sizes,
                                       self._exceeding[channels] / self._rows))
        tokens = self._tokens.nonzero().flatten()
        if tokens.numel():
            tokens = tokens[self._token_size[tokens].argsort(descending=True)]
            found.append(self._outlier("activation token", tokens, self._token_size[tokens],
                                       self._tokens[tokens] / self._sequences[tokens]))
        if self._massive:
            places = sorted(self._massive, key=lambda place: -self._massive[place][0])
            tokens_of = ", ".join(str(token) for _, token in places[:LISTED] if token >= 0)
            found.append(self._outlier(
                "massive activation",
                torch.tensor([channel for channel, _ in places]),
                torch.tensor([self._massive[place][0] for place in places]),
                torch.tensor([self._massive[place][1] / self._batches for place in places]),
                f"channels, in tokens {tokens_of}" if tokens_of else "channels"))
        return found

    def _outlier(
        self, kind: OutlierKind, indices: torch.Tensor, sizes: torch.Tensor, shares: torch.Tensor,
        detail: str = "",
    ) -> Outlier:
        return _outlier(kind, self.node.name, self.node, indices, sizes, shares,
                        detail or f"read by {self.reader.name}")

    def profile(self) -> Profile | None:
        """None where nothing was seen, or the channels changed their number."""
        seen = self._tally.total
        if seen is None or seen.channels is None or seen.channel_amax is None:
            return None
        spread, relative = of_norms(seen.channels.norm)
        return Profile(
            node=self.node.name, op=_op(self.node), source=source_line(self.node),
            reader=self.reader.name, layer=self.layer, channels=seen.channel_amax.numel(),
            amax=grouped(seen.channel_amax.tolist()),
            outliers=tuple(self.channels()[0].tolist()),
            kurtosis=seen.channels.tensor_kurtosis, channel_kurtosis=seen.channels.mean_kurtosis,
            difficulty=spread, relative_difficulty=relative)


def weight_outliers(program: Program, bound: float) -> list[Outlier]:
    """Rows and columns of weights, as ``Criteria.weight`` bounds them; tied weights once.

    A convolution's rows are its output channels, its columns the input channels, taps included.
    """
    found: list[Outlier] = []
    seen: set[Any] = set()
    for node in program.module.graph.nodes:
        contraction = contraction_of(node)
        operand = contraction.operand("weight") if contraction is not None else None
        source: Any = node.args[operand.argument] if operand is not None else None
        if not isinstance(source, torch.fx.Node) or source.op != "get_attr":
            continue
        weight = _tensor(program, source)
        if weight is None or weight.dim() < 2 or (weight.data_ptr(), weight.shape) in seen:
            continue
        seen.add((weight.data_ptr(), weight.shape))
        kinds: tuple[OutlierKind, OutlierKind] = ("weight row", "weight column")
        for axis, kind in enumerate(kinds):
            outlier = _slices(weight.detach().float().abs(), axis, kind, source, node, bound)
            found += [outlier] if outlier else []
    return found


def _slices(
    size: torch.Tensor, axis: int, kind: OutlierKind, source: torch.fx.Node, reader: torch.fx.Node,
    bound: float,
) -> Outlier | None:
    rows = size.movedim(axis, 0).flatten(1)
    if min(rows.shape) < _FEW:
        return None
    amax = rows.amax(1)
    indices, sizes = _large(amax, bound)
    if not indices.numel():
        return None
    shares = (rows[indices] > _median(amax)).float().mean(1)
    first = rows[indices[0]]
    peak = float(first.max() / first.mean())
    detail = (f"read by {reader.name}; the largest has max/mean {peak:.3g}, "
              f"all have kurtosis {_kurtosis(size):.3g}")
    return _outlier(kind, str(source.target), reader, indices, sizes, shares, detail)


def _kurtosis(magnitudes: torch.Tensor) -> float:
    """Of weights, whose mean is as good as zero: E x⁴ ÷ (E x²)²."""
    squares = magnitudes.double().square()
    return float(squares.square().mean() / squares.mean().square())


def _tensor(program: Program, source: torch.fx.Node) -> torch.Tensor | None:
    found: Any = program.module
    for part in str(source.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, torch.Tensor) and found.is_floating_point() else None


def _sinks(tally: AttentionTally) -> Outlier | None:
    keys = tally.hits.nonzero().flatten()
    if not keys.numel():
        return None
    keys = keys[tally.above[keys].argsort(descending=True)]
    parts: list[str] = []
    for key in keys[:LISTED].tolist():
        share = float(tally.received[key] / tally.sequences[key])
        norm = float(tally.norms[key] / tally.with_values[key]) if tally.with_values.numel() \
            else math.nan
        value = "" if math.isnan(norm) else f", its value {norm:.2g}× the median"
        drains = ", a drain" if float(tally.drained[key]) * 2 > float(tally.hits[key]) else ""
        parts.append(f"key {key} receives {share:.0%}{value}{drains}")
    return _outlier("attention sink", tally.node.name, tally.node, keys, tally.above[keys],
                    tally.hits[keys] / tally.sequences[keys], "; ".join(parts[:4]))


def _attention_profile(tally: AttentionTally) -> AttentionProfile:
    received = tally.received / tally.sequences.clamp_min(1)
    norms = tally.norms / tally.with_values.clamp_min(1)
    return AttentionProfile(
        node=tally.node.name, source=source_line(tally.node), keys=received.numel(),
        received=grouped(received.tolist()),
        value_norms=grouped(norms.tolist()) if bool(tally.with_values.any()) else ())


def _outlier(
    kind: OutlierKind, name: str, node: torch.fx.Node, indices: torch.Tensor, sizes: torch.Tensor,
    shares: torch.Tensor, detail: str,
) -> Outlier:
    return Outlier(
        kind=kind, node=name, op=_op(node), source=source_line(node),
        indices=tuple(indices[:LISTED].tolist()), sizes=tuple(sizes[:LISTED].tolist()),
        shares=tuple(shares[:LISTED].tolist()), count=indices.numel(), detail=detail)


def _op(node: torch.fx.Node) -> str:
    return "input" if node.op == "placeholder" else str(node.target)


def _large(sizes: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which are larger than ``bound`` times the median, largest first, and their ratios."""
    if sizes.numel() < _FEW:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0)
    ratio = sizes / _median(sizes).clamp_min(1e-30)
    indices = (ratio > bound).nonzero().flatten()
    indices = indices[ratio[indices].argsort(descending=True)]
    return indices, ratio[indices]


def _median(values: torch.Tensor) -> torch.Tensor:
    """Of what is not zero; zero where all is."""
    there = values[values > 0]
    return there.median() if there.numel() else values.new_zeros(())
