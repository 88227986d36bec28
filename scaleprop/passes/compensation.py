"""Rounding weights with compensated errors: what one column loses, later columns make up for.

Rounding to nearest minimises the error of each weight; what matters is the error of the output,

    tr((W - Ŵ) H (W - Ŵ)ᵀ),   H = E[x xᵀ]   (K × K, the second moment of the layer's input).

With H = R Rᵀ, R upper triangular (a Cholesky factorisation from the last input to the first), and
V[k, j] = R[k, j]/R[j, j], the cost is Σ_j R[j, j]² ‖e_j + Σ_{k<j} V[k, j] e_k‖², e = W - Ŵ by
columns. Columns of W [N, K] are rounded in order; with those before j fixed, the j-th term is least
where column j is rounded from

    W[:, j] + Σ_{k<j} V[k, j] e_k

That is what the least-squares optimal corrections of E. Frantar et al. (GPTQ, arXiv:2210.17323,
after Optimal Brain Surgeon) come to, as J. Chee et al. show (QuIP, arXiv:2307.13304), without an
inverse of H. A diagonal H leaves round-to-nearest, exactly.

The order of the columns is free. Those with the largest H_kk, whose errors cost most, may come
first, while most columns are still free to make up for them ("act-order", in the authors' own
implementation of the above). Neighbours that share a scale are then rounded far apart, so all
scales are found beforehand, from W itself ("static groups"). Codes stay in their places: nothing
differs at run time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from scaleprop.errors import CalibrationError, PassError
from scaleprop.formats import ScaledFormat, ScaledTensor, parse, quantize
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.rounding import nearest
from scaleprop.formats.scales import (
    Scales,
    affine_codes,
    find_scales,
    given_scales,
    tensor_scale_of,
    whole_amax,
)

DAMPING = 0.01
_SPAN = 128  # columns whose errors reach the columns after them in one product
_STEP = 16  # columns whose errors reach the rest of their span in one product
_ROWS = 2048  # rows at a time: a span of them stays in cache


# (column, what is left of the columns to round, the columns as given) → the column's scales
_ScalesOf = Callable[[int, Tensor, Tensor], Scales]


@dataclasses.dataclass(frozen=True)
class Curvature:
    """H as rounding needs it; weights that read the same value share one.

    factor: V, unit upper triangular [K, K] float64, of H + damping·mean(diag H), its rows and
        columns in the order in which a weight's columns are rounded.
    order: [K], the columns in that order; None: as they are stored.
    """

    factor: Tensor
    order: Tensor | None = None

    @classmethod
    def of(
        cls, moment: Tensor, size: int, damping: float = DAMPING, act_order: bool = False
    ) -> Curvature:
        """Of a second moment [K, K], or any positive multiple of one; ``size``: K.

        Raises:
            CalibrationError: another shape, not finite, or not positive definite.
        """
        _check_moment(moment, size)
        order = moment.diagonal().argsort(descending=True, stable=True) if act_order else None
        sorted_ = moment if order is None else moment[order][:, order]
        return cls(_factor(sorted_, damping), order)


def compensated(
    matrix: Tensor,
    fmt: str | ScaledFormat,
    moment: Tensor,
    damping: float = DAMPING,
    clipping: Literal["amax", "mse"] = "amax",
    *,
    act_order: bool = False,
    static_groups: bool = False,
) -> ScaledTensor:
    """``matrix`` [N, K] quantized along K, so that its product with inputs of ``moment`` is close.

    A block's scales are found when its first column is reached, from what is then left to round;
    scales of rows, of the tensor, and tensor scales are found once, from ``matrix`` itself.

    moment: [K, K], H or any positive multiple of it (a sum over samples will do).
    damping: added to H's diagonal, in units of its mean. Inputs that are always 0 round to nearest.
    clipping: how scales are found: the format's own rule, or the search for least squared error.
    act_order: round columns by descending diagonal of H; scales of blocks are then found once too.
    static_groups: find the scales of blocks once, from ``matrix`` itself. 2-D tiles need it.

    Raises:
        PassError: 2-D tiles or scales per input, unless all scales are found beforehand; NaN or
            Inf in matrix.
        CalibrationError: ``moment`` of another shape, not finite, or not positive definite.
    """
    check_format(parse(fmt), act_order or static_groups)
    curvature = Curvature.of(moment, matrix.shape[1], damping, act_order)
    return compensated_by(matrix, fmt, curvature, clipping, static_groups)


def compensated_by(
    matrix: Tensor,
    fmt: str | ScaledFormat,
    curvature: Curvature,
    clipping: Literal["amax", "mse"] = "amax",
    static_groups: bool = False,
) -> ScaledTensor:
    """As ``compensated``, with H factored already.

    Raises:
        PassError: as ``compensated``.
    """
    fmt = parse(fmt)
    static = static_groups or curvature.order is not None
    check_format(fmt, static)
    if not bool(matrix.isfinite().all()):
        raise PassError(
            "NaN or Inf in a weight cannot be compensated: it would reach every later column. "
            "Remedy: repair the weight, or use rounding='nearest', which keeps it in its block"
        )
    found = fmt.replace(rule="mse") if clipping == "mse" else fmt
    work = matrix.detach()
    work = work if work.dtype == torch.float64 else work.float()
    if work.numel() == 0:
        return _with_scales(matrix, fmt, quantize(work, found))
    plan = _Plan.of(work, found, curvature, static)
    pieces = [plan.round(work, start) for start in range(0, work.shape[0], _ROWS)]
    values = torch.cat([piece for piece, _ in pieces])
    if plan.fixed is not None:
        scales = plan.fixed.stored
    else:
        scales = [torch.cat(parts) for parts in zip(*(found for _, found in pieces), strict=True)]
    scales += [plan.outer] if plan.outer is not None else []
    # every value is on the grid of its scale: this finds its code and nothing else
    return _with_scales(matrix, fmt, quantize(values, fmt, scales=scales))


def _with_scales(matrix: Tensor, fmt: ScaledFormat, quantized: ScaledTensor) -> ScaledTensor:
    return ScaledTensor.from_parts(quantized.parts, fmt, matrix.shape, dtype=matrix.dtype)


def check_format(fmt: ScaledFormat, static: bool) -> None:
    """Raise ``PassError`` for scales that cannot be found while columns are rounded in turn."""
    if not static and fmt.granularity.kind in ("tile", "channel"):
        raise PassError(
            f"{fmt} cannot be rounded with compensation: a scale [{fmt.granularity}] joins columns "
            "before they are final. Remedy: use 1-D blocks or [row], find scales beforehand "
            "(solve-weights{static_groups=true}), or rounding='nearest' for this format"
        )


def _check_moment(moment: Tensor, size: int) -> None:
    if tuple(moment.shape) != (size, size):
        raise CalibrationError(
            f"the second moment is {list(moment.shape)}, but a weight with {size} inputs needs "
            f"[{size}, {size}]. Remedy: calibrate the values that this weight is multiplied with"
        )
    if not bool(moment.isfinite().all()):
        raise CalibrationError(
            "the second moment holds NaN or Inf. Remedy: drop calibration batches whose "
            "activations overflow"
        )


def _factor(moment: Tensor, damping: float) -> Tensor:
    """V, unit upper triangular [K, K] float64, of H + damping·mean(diag H)."""
    wide, size = moment.double(), moment.shape[0]
    diagonal = wide.diagonal()
    mean = float(diagonal.mean()) if size else 0.0
    dead = diagonal == 0
    damped = wide / mean if mean > 0 else torch.zeros_like(wide)
    damped.diagonal().add_(damping).masked_fill_(dead, 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if bool(failed) or bool((diagonal < 0).any()):
        raise CalibrationError(
            f"the second moment is not positive definite, even with damping {damping}. Remedy: "
            "calibrate with more, and more varied, inputs, or give a larger damping"
        )
    return (lower / lower.diagonal()).flip(0, 1)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Scales known beforehand. Parts [G, N] or [G, 1]; a scale spans ``width`` columns.

    stored: scale, and zero point of formats with one, as a quantized tensor stores them.
    """

    scales: Scales
    width: int
    stored: list[Tensor]

    @classmethod
    def of(cls, work: Tensor, fmt: ScaledFormat) -> _Table:
        grouping = Grouping(fmt.granularity, tuple(work.shape))
        found = find_scales(grouping.split(work), fmt, grouping)
        kind, tile = fmt.granularity.kind, fmt.granularity.rows

        def by_column(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            compact = grouping.compact(part)
            table = compact.reshape(1, -1) if kind in ("tensor", "channel") else compact
            if kind == "tile":
                table = table.repeat_interleave(tile, 0)[: work.shape[0]]
            return table.t().contiguous()

        scale = by_column(found.scale)
        assert scale is not None
        table = Scales(scale, found.tensor_scale, by_column(found.zero_point),
                       by_column(found.encode))
        stored = [grouping.compact(part) for part in _parts(found)]
        blocked = kind in ("block", "tile")
        width = fmt.granularity.columns if blocked else work.shape[1] // scale.shape[0]
        return cls(table, width, stored)

    def at(self, group: int, cut: slice) -> Scales:
        """The scales of one group of columns, for the rows in ``cut``."""

        def row(part: Tensor | None) -> Tensor | None:
            if part is None:
                return None
            return part[group, cut] if part.shape[1] > 1 else part[group]

        scale = row(self.scales.scale)
        assert scale is not None
        return Scales(scale, self.scales.tensor_scale, row(self.scales.zero_point),
                      row(self.scales.encode))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What all rows share. fixed: scales known beforehand; outer: the tensor scale."""

    fmt: ScaledFormat
    curvature: Curvature
    fixed: _Table | None
    outer: Tensor | None

    @classmethod
    def of(
        cls, work: Tensor, fmt: ScaledFormat, curvature: Curvature, static: bool
    ) -> _Plan:
        if static or fmt.granularity.kind != "block":
            fixed = _Table.of(work, fmt)
            return cls(fmt, curvature, fixed, fixed.scales.tensor_scale)
        outer = tensor_scale_of(whole_amax(work.abs()), fmt) if fmt.two_level else None
        return cls(fmt, curvature, None, outer)

    def round(self, work: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        """Rounded values [n, K] of ``_ROWS`` rows from ``start``; the scales found on the way."""
        cut = slice(start, start + _ROWS)
        rows, found = work[cut], list[list[Tensor]]()
        if self.fixed is not None:
            return self._columns(rows, self._fixed_scales(self.fixed, cut)), []
        width = self.fmt.granularity.columns
        current: Scales | None = None

        def of_block(column: int, left: Tensor, given: Tensor) -> Scales:
            nonlocal current
            if current is None or column % width == 0:
                block = self._corrected(slice(column, column + width), left, given)
                current = self._block_scales(block.t().to(rows.dtype))
                found.append(_parts(current))
            return current

        values = self._columns(rows, of_block, width)
        return values, [torch.stack(parts, -1) for parts in zip(*found, strict=True)]

    def _corrected(self, block: slice, left: Tensor, given: Tensor) -> Tensor:
        """The columns of a block [b, n], none rounded yet, as they best make up for those before.

        Each of them makes its term of the cost zero: with d their change, for j in the block,
        d_j + Σ_{k<j, k in block} V[k, j] d_k = Σ_{k before it} V[k, j] e_k.
        """
        within = self.curvature.factor[block, block].t()
        owed = left[block] - given[block]
        return given[block] + torch.linalg.solve_triangular(
            within, owed, upper=False, unitriangular=True)  # fmt: skip

    def _fixed_scales(self, fixed: _Table, cut: slice) -> _ScalesOf:
        order = self.curvature.order
        places = None if order is None else order.tolist()
        last: tuple[int, Scales] | None = None

        def of_column(column: int, _left: Tensor, _given: Tensor) -> Scales:
            nonlocal last
            group = (column if places is None else places[column]) // fixed.width
            if last is None or last[0] != group:
                last = group, fixed.at(group, cut)
            return last[1]

        return of_column

    def _block_scales(self, block: Tensor) -> Scales:
        """One scale a row of one block [n, ≤ block size]."""
        grouping = Grouping(self.fmt.granularity, tuple(block.shape))
        grouped = grouping.split(block)
        if self.outer is None:
            return _flat(find_scales(grouped, self.fmt, grouping))
        return _flat(given_scales([self.outer], grouped, self.fmt, grouping))

    def _columns(self, rows: Tensor, scales_of: _ScalesOf, width: int = 1) -> Tensor:
        """The values that ``rows`` [n, K] become. ``scales_of``: asked for every column; at each
        multiple of ``width``, all columns before it have reached those after it."""
        order, factor = self.curvature.order, self.curvature.factor
        size, span = rows.shape[1], width * max(_SPAN // width, 1)
        left = rows.double().t()  # [K, n]: a column of the weight is contiguous
        left = left.contiguous() if order is None else left[order]
        given = left.clone()
        rounded = torch.empty_like(left, dtype=rows.dtype)
        for begin in range(0, size, span):
            end = min(begin + span, size)
            errors = torch.empty_like(left[begin:end])
            starts = {*range(begin, end, _STEP), *range(begin, end, width if width > 1 else _STEP)}
            for low, high in itertools.pairwise([*sorted(starts), end]):
                for column in range(low, high):  # each depends on those before it
                    scales = scales_of(column, left, given)
                    value = scales.restore(self._nearest(left[column].to(rows.dtype), scales))
                    rounded[column] = value
                    error = torch.sub(given[column], value, out=errors[column - begin])
                    left[column + 1 : high].addr_(factor[column, column + 1 : high], error)
                made = errors[low - begin : high - begin]
                left[high:end].addmm_(factor[low:high, high:end].t(), made)
            left[end:].addmm_(factor[begin:end, end:].t(), errors)
        if order is None:
            return rounded.t()
        return torch.empty_like(rounded).index_copy_(0, order, rounded).t()

    def _nearest(self, column: Tensor, scales: Scales) -> Tensor:
        """The nearest values of the element, in units of their scales."""
        if scales.zero_point is None:
            return nearest(scales.normalize(column), self.fmt.element)
        return affine_codes(column, scales, self.fmt) - scales.zero_point


def _parts(scales: Scales) -> list[Tensor]:
    """What is stored for each row or block: the scale, and the zero point of formats with one."""
    return [part for part in (scales.scale, scales.zero_point) if part is not None]


def _flat(scales: Scales) -> Scales:
    """Scales with one entry a row."""

    def flat(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.reshape(-1)

    return Scales(scales.scale.reshape(-1), scales.tensor_scale, flat(scales.zero_point),
                  flat(scales.encode))
