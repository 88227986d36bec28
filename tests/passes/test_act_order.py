"""Columns by descending curvature: against one number at a time, for every granularity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from scaleprop.errors import PassError
from scaleprop.formats import parse, quantize
from scaleprop.formats.quantize import representable
from scaleprop.passes.compensation import Curvature, compensated, compensated_by

ROWS, SIZE = 6, 44


def uneven(size: int = SIZE, seed: int = 0) -> Tensor:
    """A second moment with strong directions and diagonal entries of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(400, 6, generator=generator) @ torch.randn(6, size, generator=generator)
    x = mixed + 0.5 * torch.randn(400, size, generator=generator)
    x = x * torch.logspace(-1, 1, size)[torch.randperm(size, generator=generator)]
    return (x.t() @ x).double()


def weight(rows: int = ROWS, size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(matrix: Tensor, approximation: Tensor, moment: Tensor) -> float:
    d = matrix.double() - approximation.double()
    return float(((d @ moment) * d).sum())


def nearest_number(x: float, grid: Sequence[float]) -> float:
    return min(grid, key=lambda value: abs(value - x))


def solved_slowly(
    row: list[float], moment: Tensor, order: list[int], scales: list[float], zeros: list[float],
    grid: Sequence[float],
) -> list[float]:
    """One row: fix the columns in ``order``; the free ones take the least-squares correction that
    the definition gives, by a linear system of its own for each column."""
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(len(row), dtype=torch.float64)
    left, result = list(row), [math.nan] * len(row)
    for step, j in enumerate(order):
        steps = nearest_number(left[j] / scales[j] + zeros[j], grid) - zeros[j]
        result[j] = steps * scales[j]
        free = order[step + 1 :]
        if free:
            block = damped[free][:, free]
            change = torch.linalg.solve(block, damped[free, j]) * (left[j] - result[j])
            for k, by in zip(free, change.tolist(), strict=True):
                left[k] += by
    return result


CASES = {
    "int4[row]*f32": SIZE,
    "int4[tensor]*f32": SIZE,
    "int4[1x8]*f32": 8,
    "int3[1x12]*f32": 12,  # 44 is no multiple of it
    "e2m1[1x16]*e8m0": 16,
    "int4[1x16]*f32+zp": 16,
    "int8[row]*f32+zp": SIZE,
    "int4[4x16]*f32": 16,
    "int4[channel]*f32": 1,
}


@pytest.mark.parametrize("fmt", CASES)
def test_against_the_definition_one_number_at_a_time(fmt: str):
    matrix, moment = weight(), uneven()
    plain = quantize(matrix, fmt)  # its scales are those of the unrounded weight
    order = sorted(range(SIZE), key=lambda k: -float(moment[k, k]))
    assert order != list(range(SIZE))
    kind, tile = parse(fmt).granularity.kind, parse(fmt).granularity.rows

    def at(part: Tensor | None, n: int, k: int) -> float:
        if part is None:
            return 0.0
        place = {"row": (n, 0), "tensor": (), "channel": (k,)}.get(kind,
                                                                  (n // tile, k // CASES[fmt]))
        return float(part[place])

    element = parse(fmt).element
    grid = [float(v) for v in range(2**element.bits)] if plain.zero_point is not None \
        else representable(element)  # fmt: skip
    want = [
        solved_slowly(
            matrix[n].double().tolist(), moment, order,
            [at(plain.scale.float(), n, k) for k in range(SIZE)],
            [at(plain.zero_point, n, k) for k in range(SIZE)], grid)
        for n in range(ROWS)
    ]  # fmt: skip
    got = compensated(matrix, fmt, moment, act_order=True)
    torch.testing.assert_close(got.dequantize(), torch.tensor(want), rtol=1e-6, atol=0)
    assert torch.equal(got.scale.float(), plain.scale.float())
    in_place = compensated(matrix, fmt, moment, static_groups=True)
    assert not torch.equal(in_place.codes(), got.codes())


@pytest.mark.parametrize(("fmt", "width"), [("int4[1x8]*f32", 8), ("int3[1x12]*f32", 12)])
def test_scales_of_blocks_are_found_from_what_is_then_left(fmt: str, width: int):
    """In their stored order: by the corrections that Optimal Brain Surgeon makes for each column,
    with a linear system of its own, a block's columns are changed before its scale is found."""
    matrix, moment = weight(), uneven()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(SIZE, dtype=torch.float64)
    top = max(representable(parse(fmt).element))
    left, want = matrix.double(), torch.zeros(ROWS, SIZE)
    scale = torch.zeros(ROWS)
    for j in range(SIZE):
        if j % width == 0:
            scale = left[:, j : j + width].float().abs().amax(1) / top
        want[:, j] = torch.clamp(torch.round(left[:, j].float() / scale), -top, top) * scale
        free = damped[j + 1 :, j + 1 :]
        error = left[:, j] - want[:, j].double()
        left[:, j + 1 :] += error[:, None] * torch.linalg.solve(free, damped[j + 1 :, j])
    got = compensated(matrix, fmt, moment)
    torch.testing.assert_close(got.dequantize(), want, rtol=1e-5, atol=0)


FORMATS = ("int4[1x32]*f32+zp", "int8[row]*f32", "int8", "mxfp4", "mxfp8:rceil", "nvfp4",
           "nvfp4:fouroversix", "nvfp4_2d", "int4", "nf4", "int4[1x200]*f32", "int4[16x32]*f32",
           "fp4_ue5m3")  # fmt: skip


@pytest.mark.parametrize("clipping", ["amax", "mse"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_outputs_are_closer_than_with_rounding_to_nearest(fmt: str, clipping: str):
    matrix, moment = weight(40, 300), uneven(300)
    searched = parse(fmt).replace(rule="mse") if clipping == "mse" else fmt
    nearest = output_error(matrix, quantize(matrix, searched).dequantize(), moment)
    for options in ({"act_order": True}, {"static_groups": True}):
        got = compensated(matrix, fmt, moment, clipping=clipping, **options)  # type: ignore[arg-type]
        assert output_error(matrix, got.dequantize(), moment) < 0.9 * nearest
        values = got.dequantize()
        given = [part for part in (got.scale, got.tensor_scale, got.zero_point) if part is not None]
        assert torch.equal(quantize(values, fmt, scales=given).dequantize(), values)


def test_the_order_pays_where_curvatures_differ():
    """In the mean over weights, as the paper's authors report for layers of uneven inputs."""
    errors = []
    for seed in range(6):
        matrix, moment = weight(32, 96, seed), uneven(96, seed)
        for options in ({"act_order": True}, {"static_groups": True}):
            got = compensated(matrix, "int3[row]*f32", moment, **options)  # type: ignore[arg-type]
            errors.append(output_error(matrix, got.dequantize(), moment))
    assert sum(errors[::2]) < 0.9 * sum(errors[1::2])


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4", "int4[row]*f32", "int4+zp", "nvfp4_2d", "fp8"])
def test_equal_curvatures_keep_the_order_and_diagonal_ones_nearest(fmt: str):
    matrix = weight(24, 96)
    spread = torch.rand(96, generator=torch.Generator().manual_seed(2)).double() + 0.1
    for moment in (torch.eye(96), torch.diag(spread), torch.zeros(96, 96)):
        got = compensated(matrix, fmt, moment, act_order=True)
        assert torch.equal(got.dequantize(), quantize(matrix, fmt).dequantize())


def test_rows_are_independent_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch):
    matrix, moment = weight(24, 96), uneven(96)
    for fmt in ("mxfp4", "nvfp4", "int4[row]*f32", "int4+zp", "fp8", "nvfp4_2d"):
        whole = compensated(matrix, fmt, moment, act_order=True)
        monkeypatch.setattr("scaleprop.passes.compensation._ROWS", 7)
        again = compensated(matrix, fmt, moment, act_order=True)
        monkeypatch.undo()
        assert torch.equal(again.dequantize(), whole.dequantize())


def test_a_block_of_zeros_stays_finite_where_errors_reach_it():
    matrix, moment = weight(8, 64), uneven(64)
    matrix[:, 16:48] = 0
    for fmt in ("nvfp4", "mxfp4", "int4[1x16]*f32", "nvfp4_2d", "int4[1x16]*f32+zp"):
        got = compensated(matrix, fmt, moment, act_order=True).dequantize()
        assert got.isfinite().all()
        assert output_error(matrix, got, moment) < output_error(
            matrix, quantize(matrix, fmt).dequantize(), moment)  # fmt: skip


def test_one_factorisation_serves_several_weights():
    moment = uneven()
    shared = Curvature.of(moment, SIZE, act_order=True)
    for seed in (1, 2):
        want = compensated(weight(seed=seed), "mxfp4", moment, act_order=True)
        got = compensated_by(weight(seed=seed), "mxfp4", shared)
        assert torch.equal(got.codes(), want.codes())


def test_tiles_need_scales_found_beforehand():
    with pytest.raises(PassError, match="static_groups=true"):
        compensated(weight(), "nvfp4_2d", uneven())
