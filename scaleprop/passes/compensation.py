"""Rounding weights with compensated errors: what one column loses, later columns make up for.

Rounding to nearest minimises the error of each weight; what matters is the error of the output,

    tr((W - Ŵ) H (W - Ŵ)ᵀ),   H = E[x xᵀ]   (K × K, the second moment of the layer's input).

Columns of W [N, K] are rounded in order. With column j fixed, the columns k > j that are still
free take the least-squares optimal correction

    W[:, k] -= e_j · U[j, k],   e_j = (W[:, j] - Ŵ[:, j]) / U[j, j],   H⁻¹ = Uᵀ U,  U upper

(E. Frantar et al., GPTQ, arXiv:2210.17323, after Optimal Brain Surgeon). With H = R Rᵀ, R upper
(a Cholesky factorisation from the last input to the first), U = R⁻¹, so H⁻¹ is never formed.
A diagonal H leaves round-to-nearest, exactly.
"""

from __future__ import annotations

import dataclasses
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
_ROWS = 2048  # rows at a time: a span of them stays in cache


def compensated(
    matrix: Tensor,
    fmt: str | ScaledFormat,
    moment: Tensor,
    damping: float = DAMPING,
    clipping: Literal["amax", "mse"] = "amax",
) -> ScaledTensor:
    """``matrix`` [N, K] quantized along K, so that its product with inputs of ``moment`` is close.

    A block's scales are found when its first column is reached, from what is then left to round;
    scales of rows, of the tensor, and tensor scales are found once, from ``matrix`` itself.

    moment: [K, K], H or any positive multiple of it (a sum over samples will do).
    damping: added to H's diagonal, in units of its mean. Inputs that are always 0 round to nearest.
    clipping: how scales are found: the format's own rule, or the search for least squared error.

    Raises:
        PassError: a format with 2-D tiles or scales per input; NaN or Inf in matrix.
        CalibrationError: ``moment`` of another shape, not finite, or not positive definite.
    """
    fmt = parse(fmt)
    _check(matrix, fmt)
    found = fmt.replace(rule="mse") if clipping == "mse" else fmt
    work = matrix.detach()
    work = work if work.dtype == torch.float64 else work.float()
    if work.numel() == 0:
        return _with_scales(matrix, fmt, quantize(work, found))
    factor = _factor(moment, work.shape[1], damping)
    plan = _Plan.of(work, found, factor)
    pieces = [plan.round(work, start) for start in range(0, work.shape[0], _ROWS)]
    values = torch.cat([piece for piece, _ in pieces])
    if fmt.granularity.kind == "tensor":
        scales = [part.reshape(()) for part in pieces[0][1]]
    else:
        scales = [torch.cat(parts) for parts in zip(*(found for _, found in pieces), strict=True)]
    scales += [plan.outer] if plan.outer is not None else []
    # every value is on the grid of its scale: this finds its code and nothing else
    return _with_scales(matrix, fmt, quantize(values, fmt, scales=scales))


def _with_scales(matrix: Tensor, fmt: ScaledFormat, quantized: ScaledTensor) -> ScaledTensor:
    return ScaledTensor.from_parts(quantized.parts, fmt, matrix.shape, dtype=matrix.dtype)


def _check(matrix: Tensor, fmt: ScaledFormat) -> None:
    if fmt.granularity.kind in ("tile", "channel"):
        raise PassError(
            f"{fmt} cannot be rounded with compensation: a scale [{fmt.granularity}] joins columns "
            "before they are final. Remedy: use 1-D blocks or [row], or rounding='nearest' for "
            "this format"
        )
    if not bool(matrix.isfinite().all()):
        raise PassError(
            "NaN or Inf in a weight cannot be compensated: it would reach every later column. "
            "Remedy: repair the weight, or use rounding='nearest', which keeps it in its block"
        )


def _factor(moment: Tensor, size: int, damping: float) -> Tensor:
    """U, upper triangular [K, K] float64, with (H + damping·mean(diag H))⁻¹ = Uᵀ U."""
    if tuple(moment.shape) != (size, size):
        raise CalibrationError(
            f"the second moment is {list(moment.shape)}, but a weight with {size} inputs needs "
            f"[{size}, {size}]. Remedy: calibrate the values that this weight is multiplied with"
        )
    wide = moment.double()
    if not bool(wide.isfinite().all()):
        raise CalibrationError(
            "the second moment holds NaN or Inf. Remedy: drop calibration batches whose "
            "activations overflow"
        )
    diagonal = wide.diagonal()
    mean = float(diagonal.mean())
    dead = diagonal == 0
    damped = wide / mean if mean > 0 else torch.zeros_like(wide)
    damped.diagonal().add_(damping).masked_fill_(dead, 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if bool(failed) or bool((diagonal < 0).any()):
        raise CalibrationError(
            f"the second moment is not positive definite, even with damping {damping}. Remedy: "
            "calibrate with more, and more varied, inputs, or give a larger damping"
        )
    identity = torch.eye(size, dtype=torch.float64, device=wide.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What all rows share. fixed: scales known beforehand (rows, tensor); outer: tensor scale."""

    fmt: ScaledFormat
    factor: Tensor
    fixed: Scales | None
    outer: Tensor | None

    @classmethod
    def of(cls, work: Tensor, fmt: ScaledFormat, factor: Tensor) -> _Plan:
        if fmt.granularity.kind != "block":
            grouping = Grouping(fmt.granularity, tuple(work.shape))
            fixed = find_scales(grouping.split(work), fmt, grouping)
            return cls(fmt, factor, fixed, fixed.tensor_scale)
        outer = tensor_scale_of(whole_amax(work.abs()), fmt) if fmt.two_level else None
        return cls(fmt, factor, None, outer)

    def round(self, work: Tensor, start: int) -> tuple[Tensor, list[Tensor]]:
        """Rounded values [n, K] of ``_ROWS`` rows from ``start``; their scales, and zero points."""
        rows = work[start : start + _ROWS]
        if self.fixed is not None:
            per_row = self.fmt.granularity.kind == "row"
            cut = slice(start, start + _ROWS) if per_row else slice(None)
            scales = _per_row(self.fixed, cut)
            values = self._columns(rows, rows.shape[1], lambda _: scales)
            return values, [part.reshape(-1, 1) for part in _parts(scales)]
        found: list[list[Tensor]] = []

        def of_block(block: Tensor) -> Scales:
            scales = self._block_scales(block)
            found.append(_parts(scales))
            return scales

        values = self._columns(rows, self.fmt.granularity.columns, of_block)
        return values, [torch.stack(parts, -1) for parts in zip(*found, strict=True)]

    def _block_scales(self, block: Tensor) -> Scales:
        """One scale a row of one block [n, ≤ block size]."""
        grouping = Grouping(self.fmt.granularity, tuple(block.shape))
        grouped = grouping.split(block)
        if self.outer is None:
            return _per_row(find_scales(grouped, self.fmt, grouping))
        return _per_row(given_scales([self.outer], grouped, self.fmt, grouping))

    def _columns(
        self, rows: Tensor, group: int, scales_of: Callable[[Tensor], Scales]
    ) -> Tensor:
        """The values that ``rows`` [n, K] become. ``scales_of``: asked at each group's start."""
        size = rows.shape[1]
        span = group * max(_SPAN // group, 1) if self.fixed is None else _SPAN
        left = rows.double().t().contiguous()  # [K, n]: a column of the weight is contiguous
        rounded = torch.empty_like(left, dtype=rows.dtype)
        scales: Scales | None = None
        for begin in range(0, size, span):
            end = min(begin + span, size)
            errors = torch.empty_like(left[begin:end])
            for column in range(begin, end):  # each depends on those before it
                if scales is None or column % group == 0:
                    scales = scales_of(left[column : column + group].t().to(rows.dtype))
                value = scales.restore(self._nearest(left[column].to(rows.dtype), scales))
                rounded[column] = value
                error = (left[column] - value) / self.factor[column, column]
                errors[column - begin] = error
                reach = self.factor[column, column + 1 : end]
                left[column + 1 : end].addr_(reach, error, alpha=-1)
            left[end:].addmm_(self.factor[begin:end, end:].t(), errors, alpha=-1)
        return rounded.t()


    def _nearest(self, column: Tensor, scales: Scales) -> Tensor:
        """The nearest values of the element, in units of their scales."""
        if scales.zero_point is None:
            return nearest(scales.normalize(column), self.fmt.element)
        return affine_codes(column, scales, self.fmt) - scales.zero_point


def _parts(scales: Scales) -> list[Tensor]:
    """What is stored for each row or block: the scale, and the zero point of formats with one."""
    return [part for part in (scales.scale, scales.zero_point) if part is not None]


def _per_row(scales: Scales, cut: slice = slice(None)) -> Scales:
    """Scales with one entry a row (or one in all), broadcastable against a column [n]."""

    def flat(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.reshape(-1)[cut]

    return Scales(scales.scale.reshape(-1)[cut], scales.tensor_scale, flat(scales.zero_point),
                  flat(scales.encode))
