"""The candidates for one matrix product x̂·ŵᵀ, and the choice between them.

Errors are relative to the largest output and stated per candidate; 0 means: equal to the exact sum
rounded once to float32. A row or column held in L limbs is off by at most ½·128^-(L-1)/127 of its
largest entry; in a sum over K these errors add like noise, and 7½ times the single one has not
been exceeded in any distribution that the tests draw from.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.quantized import cost
from scaleprop.backends.onnxruntime.quantized.emit import ZERO, Emitter
from scaleprop.backends.onnxruntime.quantized.operand import MOST_LIMBS, Quantized
from scaleprop.backends.onnxruntime.quantized.weights import MAX_LIMBS, Weight
from scaleprop.formats.elements import IntegerElement
from scaleprop.recipes.base import TOLERANCE

ROUNDING = 2.0**-21  # a handful of float32 roundings
FLOAT_SUM = 2.0**-18  # a float32 sum over K
WORTH = 1.3  # how much faster a lowering must be that is less accurate than a float32 sum


def limb_error(count: int) -> float:
    """Error of a product whose one operand is cut to ``count`` limbs."""
    return 7.5 * 0.5 * 128.0 ** -(count - 1) / 127.0


@dataclasses.dataclass(frozen=True)
class Problem:
    """y[..., n] = Σ_k x̂[..., k]·ŵ[n, k] (+ bias); ``rows``: in the example."""

    x: Quantized
    w: Weight
    rows: int
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)."""
        return self.rows, self.w.inputs, self.w.outputs


@dataclasses.dataclass(frozen=True)
class Candidate(abc.ABC):
    """One way to run a product."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What the report shows."""

    @abc.abstractmethod
    def error(self, p: Problem) -> float:
        """Stated bound, relative to the largest output."""

    @abc.abstractmethod
    def seconds(self, p: Problem) -> float:
        """Estimate."""

    @abc.abstractmethod
    def loading(self, p: Problem) -> float:
        """Bytes per weight while a session loads: what is folded on the way stays to the end."""

    @abc.abstractmethod
    def emit(self, e: Emitter, p: Problem) -> ir.Value:
        """Append the nodes."""


def activation_passes(p: Problem) -> tuple[float, int]:
    """(elementwise passes, nodes) of quantizing the activation to float32."""
    if p.x.format is None:
        return 0.0, 0
    return (10.0, 18) if p.x.format.block is not None else (4.0, 6)


def with_bias(e: Emitter, y: ir.Value, p: Problem) -> ir.Value:
    """The bias, added last, in float32."""
    return y if p.bias is None else e("Add", y, bias_value(e, p))


def bias_value(e: Emitter, p: Problem) -> ir.Value:
    """The bias as an initializer."""
    assert p.bias is not None
    return e.builder.initializer(p.bias.float(), f"{p.w.name}_bias")


@dataclasses.dataclass(frozen=True)
class ByteProduct(Candidate):
    """Integer codes × integer codes: one u8×s8 kernel; row scales and bias follow."""

    @property
    def name(self) -> str:
        return "MatMulIntegerToFloat u8×s8"

    def error(self, p: Problem) -> float:
        return ROUNDING

    def seconds(self, p: Problem) -> float:
        m, k, n = p.shape
        by_row = 3.0 if self._by_row(p) else 1.0
        return cost.byte_gemm(m, k, n) + cost.passes(by_row, m * (k + n), 4)

    def loading(self, p: Problem) -> float:
        return 2.0

    @staticmethod
    def _by_row(p: Problem) -> bool:
        return p.x.format is not None and p.x.format.granularity.kind == "row"

    def emit(self, e: Emitter, p: Problem) -> ir.Value:
        codes = p.x.codes
        matrix, columns = p.w.limb_matrix(e, 1)
        zeros = p.w.zero_points(e)
        if codes.by_row:
            y = e.contrib("MatMulIntegerToFloat", codes.codes, matrix, 1.0, columns, codes.zero,
                          zeros)
            return with_bias(e, e("Mul", y, codes.scale), p)
        bias = None if p.bias is None else bias_value(e, p)
        return e.contrib("MatMulIntegerToFloat", codes.codes, matrix, codes.scale, columns,
                         codes.zero, zeros, bias)


@dataclasses.dataclass(frozen=True)
class LimbProduct(Candidate):
    """T1: rows and columns in base-128 limbs, one u8×s8 kernel for all pairs of limbs."""

    x_limbs: int
    w_limbs: int

    @property
    def name(self) -> str:
        return (f"MatMulIntegerToFloat u8×s8, {self.x_limbs} activation × {self.w_limbs} "
                f"weight limbs")

    def error(self, p: Problem) -> float:
        exact_w = p.w.limbs_needed is not None and self.w_limbs >= p.w.limbs_needed
        exact_x = p.x.closes_exactly or (p.x.integer_rows and self.x_limbs >= 2)
        if exact_w and exact_x and self._rounds_once(p):
            return 0.0
        cut = (not exact_w) * limb_error(self.w_limbs) + (not exact_x) * limb_error(self.x_limbs)
        return cut + ROUNDING

    def _rounds_once(self, p: Problem) -> bool:
        """Whether both integer sums are float32 numbers and all scales are powers of two.

        The kernel converts its accumulator to float32 before scaling; the only rounding left is
        the sum of two limbs. (Rows whose blocks lie more than ten exponents apart take four.)
        """
        fits = p.x.limb_peak * p.w.column_sum < 2.0**24
        return self.w_limbs == 1 and fits and p.w.power_columns \
            and p.x.power_scales

    def seconds(self, p: Problem) -> float:
        m, k, n = p.shape
        count, nodes = activation_passes(p)
        limbs = self.x_limbs * self.w_limbs
        grows = p.x.closes_exactly and self.x_limbs < MOST_LIMBS
        return (cost.byte_gemm(self.x_limbs * m, k, self.w_limbs * n)
                + cost.passes(count + 2 + 3 * self.x_limbs, m * k, nodes + (20 if grows else 10))
                + cost.passes(limbs + 1, m * n, 3))

    def loading(self, p: Problem) -> float:
        steps = 0.0 if p.w.integer_columns or p.w.has_limb_table else 12.0
        return steps + 3.0 * self.w_limbs

    def emit(self, e: Emitter, p: Problem) -> ir.Value:
        limbs = p.x.limbs(self.x_limbs)
        matrix, columns = p.w.limb_matrix(e, self.w_limbs)
        outer = 1.0 if limbs.outer is None else limbs.outer
        y = e.contrib("MatMulIntegerToFloat", limbs.codes, matrix, outer, columns, e.u8(ZERO),
                      p.w.zero_points(e) if p.w.integer_columns else None)
        steps = limbs.steps
        if self.w_limbs > 1:  # limbs of the weight lie side by side: one sum over all pairs
            y = e("Reshape", y, e.ints(*[0] * (p.x.rank - 1), -1, p.w.outputs))
            pairs = e("Expand", e.unsqueeze(steps, -1), e.ints(1, self.w_limbs))
            steps = e("Reshape", pairs, e.ints(-1))
        factors = e("Mul", e.unsqueeze(limbs.unit, -1), steps)
        return with_bias(e, e.squeeze(e("MatMul", factors, y), -2), p)


@dataclasses.dataclass(frozen=True)
class ResidualProduct(Candidate):
    """T2: MatMulNBits with int8 activations, fed the activation as a sum of rows.

    One row: the kernel's own rounding, blockwise amax/127. That is no error at all where the
    activation's format is int8 with the weight's block. ``unrounded``: such a row is left to the
    kernel, which then may take the other neighbour of a value (almost) halfway between two.
    """

    pieces: int
    unrounded: bool = False

    @property
    def name(self) -> str:
        if self.pieces > 1:
            return f"MatMulNBits accuracy_level=4, {self.pieces} residual rows"
        return "MatMulNBits accuracy_level=4" + ", which rounds activations" * self.unrounded

    def error(self, p: Problem) -> float:
        if rounds_alike(p) and not self.unrounded:
            return 4 * ROUNDING
        return (3e-2, 2.5e-4, 8e-6)[self.pieces - 1]

    def seconds(self, p: Problem) -> float:
        m, k, n = p.shape
        count, nodes = (0.0, 0) if self.unrounded else activation_passes(p)
        extra = self.pieces - 1
        return (cost.nbits_gemm(self.pieces * m, k, n)
                + cost.passes(count + 7 * extra, m * k, nodes + 10 * extra)
                + cost.passes(self.pieces + 1 if extra else 0, m * n, 2 * extra + 1))

    def loading(self, p: Problem) -> float:
        return 0.0

    def emit(self, e: Emitter, p: Problem) -> ir.Value:
        assert p.w.format.block is not None
        block = p.w.format.block[1]
        rows = p.x.x if self.unrounded else p.x.pieces(self.pieces, block)
        bias = bias_value(e, p) if p.bias is not None and self.pieces == 1 else None
        data, scale, zeros = p.w.nbits(e)
        y = e.contrib("MatMulNBits", rows, data, scale, zeros, None, bias, K=p.w.inputs,
                      N=p.w.outputs, bits=p.w.format.bits, block_size=block, accuracy_level=4)
        if self.pieces == 1:
            return y
        return with_bias(e, e.reduce("ReduceSum", y, [-2]), p)


def rounds_alike(p: Problem) -> bool:
    """Whether MatMulNBits rounds activations as their format says: int8, in the weight's blocks."""
    fmt = p.x.format
    return fmt is not None and isinstance(fmt.element, IntegerElement) and not fmt.zero_point \
        and fmt.element.name == "int8" and fmt.block == p.w.format.block \
        and fmt.rule == "exact" and fmt.scale.name == "f32" and not fmt.two_level \
        and not p.x.static


@dataclasses.dataclass(frozen=True)
class FloatProduct(Candidate):
    """Rounded activations × weights expanded to float32 at load: a float32 product."""

    @property
    def name(self) -> str:
        return "MatMul float32, weights expanded at load"

    def error(self, p: Problem) -> float:
        return FLOAT_SUM

    def seconds(self, p: Problem) -> float:
        m, k, n = p.shape
        count, nodes = activation_passes(p)
        return cost.float_gemm(m, k, n) + cost.passes(count + 1, m * k, nodes) + cost.passes(
            1, m * n, 2)

    def loading(self, p: Problem) -> float:
        return 16.0

    def emit(self, e: Emitter, p: Problem) -> ir.Value:
        return with_bias(e, e("MatMul", p.x.fake, p.w.float_matrix(e)), p)


def candidates(p: Problem) -> Iterator[Candidate]:
    """Every lowering that this pair of formats admits."""
    yield FloatProduct()
    if p.x.has_codes and p.w.integer_columns:
        yield ByteProduct()
    for x_limbs in _activation_limbs(p.x):
        for w_limbs in range(1, (p.w.limbs_needed or MAX_LIMBS) + 1):
            yield LimbProduct(x_limbs, w_limbs)
    if p.w.fits_nbits:
        for pieces in (1, 2, 3):
            yield ResidualProduct(pieces)
        if rounds_alike(p):
            yield ResidualProduct(1, unrounded=True)


def _activation_limbs(x: Quantized) -> Sequence[int]:
    """Numbers of limbs worth considering; exact formats start at what ordinary data needs."""
    if x.format is None:
        return (2, 3)
    return (x.usual_limbs, MOST_LIMBS) if x.closes_exactly else (2,)


def choose(p: Problem, tolerance: float = TOLERANCE, spare: float = math.inf) -> Candidate:
    """The fastest candidate within the tolerance; where some are exact, the fastest of those.

    One that is less accurate than a float32 sum has to be ``WORTH`` it. spare: bytes that loading
    may take; those that take more are for want of others.
    """
    found = list(candidates(p))
    exact = [c for c in found if c.error(p) == 0.0]
    allowed = exact or [c for c in found if c.error(p) <= tolerance] or [FloatProduct()]
    weights = p.w.inputs * p.w.outputs
    allowed = [c for c in allowed if c.loading(p) * weights <= max(spare, 0.0)] or allowed
    return min(allowed, key=lambda c: c.seconds(p) * (WORTH if c.error(p) > FLOAT_SUM * 2 else 1.0))

