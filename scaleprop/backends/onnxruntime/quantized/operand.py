"""A quantized activation, in whichever representation a kernel wants; each is emitted once.

``Quantized`` is what ``scaleprop::quantize`` lowers to. Nothing is appended until a consumer asks:
``fake`` (float32), ``codes`` (uint8 and scales), ``limbs`` (uint8 pieces of a row), ``pieces``
(float32 rows that a kernel's own int8 quantization passes through). Several linears that read one
quantize node share them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch

from scaleprop.backends.onnxruntime.quantized import rounding, scales
from scaleprop.backends.onnxruntime.quantized.emit import INT8, ZERO, Emitter
from scaleprop.backends.onnxruntime.quantized.scales import Scales
from scaleprop.formats.elements import FloatElement, IntegerElement
from scaleprop.formats.scaled import POWER_RULES, ScaledFormat

BASE = 128.0  # ratio of neighbouring limbs: a base of 256 would saturate at +128
STAGES = (1, 2, 4)  # numbers of limbs between which the graph chooses when it runs
MOST_LIMBS = STAGES[-1]


@dataclasses.dataclass(frozen=True)
class Codes:
    """x̂ = (codes - zero)·scale: uint8 codes [..., K]; scale () or, where ``by_row``, [..., 1]."""

    codes: ir.Value
    zero: ir.Value
    scale: ir.Value
    by_row: bool


@dataclasses.dataclass(frozen=True)
class Limbs:
    """x̂[..., k] = outer · unit[...] · Σ_i steps[i] · (codes[..., i, k] - 128).

    codes: uint8 [..., L, K]; steps: float32 [L], powers of two; unit: float32 [..., 1]; outer: ()
    or None. L may be found when the graph runs.
    """

    codes: ir.Value
    steps: ir.Value
    unit: ir.Value
    outer: ir.Value | None


class Quantized:
    """An activation [..., K] and the format it is quantized to (None: it stays float32).

    static: given scales ([scale], [scale, zero point], [scale, tensor scale], or [tensor scale]
        alone with block scales from the data); empty if dynamic.
    """

    def __init__(self, e: Emitter, x: ir.Value, fmt: ScaledFormat | None, rank: int, size: int,
                 static: Sequence[torch.Tensor] = ()) -> None:
        self.e = e
        self.x = x
        self.format = fmt
        self.rank = rank
        self.size = size
        self.static = tuple(static)
        self._limbs: dict[int, Limbs] = {}
        self._pieces: dict[tuple[int, int], ir.Value] = {}

    # ---- what the format allows ---------------------------------------------------------------

    @property
    def has_codes(self) -> bool:
        """Whether one integer product with these codes is exact."""
        fmt = self.format
        if fmt is None or not isinstance(fmt.element, IntegerElement):
            return False
        kind = fmt.granularity.kind
        return kind == "tensor" or (kind == "row" and not fmt.zero_point and not self.static)

    @property
    def closes_exactly(self) -> bool:
        """Whether limbs hold every value exactly, as many as the data needs."""
        fmt = self.format
        if fmt is None or self.static or fmt.granularity.kind != "block":
            return False
        narrow = isinstance(fmt.element, FloatElement) and fmt.bits <= 6
        integer = isinstance(fmt.element, IntegerElement) and not fmt.zero_point
        return (narrow or integer) and (fmt.scale.fraction_bits <= 3)

    @property
    def integer_rows(self) -> bool:
        """Whether each row is whole numbers up to ±255 times its scale: two limbs are exact."""
        fmt = self.format
        return fmt is not None and isinstance(fmt.element, IntegerElement) \
            and fmt.granularity.kind == "row" and not self.static

    @property
    def power_scales(self) -> bool:
        """Whether x̂ is the element's value times a power of two."""
        fmt = self.format
        return fmt is not None and not self.static and not fmt.two_level \
            and fmt.rule in POWER_RULES

    @property
    def usual_limbs(self) -> int:
        """How many limbs to start with: one, where it holds blocks two exponents apart."""
        assert self.format is not None
        return 1 if self._window(1) <= 0.25 * _gain(self.format) else 2

    @property
    def limb_peak(self) -> float:
        """Largest magnitude in the first limb."""
        fmt = self.format
        return 127.0 if fmt is None or fmt.block is None else fmt.element.max * _gain(fmt)

    # ---- float32 ------------------------------------------------------------------------------

    @functools.cached_property
    def _grouped(self) -> ir.Value:
        fmt = self.format
        if fmt is None or fmt.block is None:
            return self.x
        return self.e.split_last(self.x, self.rank, self.size, fmt.block[1])

    @functools.cached_property
    def scales(self) -> Scales:
        """Found from the data, or the given ones."""
        assert self.format is not None
        if not self.static:
            return scales.find(self.e, self._grouped, self.format, self.rank)
        if self.format.two_level and len(self.static) == 1:
            return scales.find(self.e, self._grouped, self.format, self.rank,
                               self.static[0].float())
        e, first = self.e, self.static[0].float()
        value = e.f32(first.numpy())
        if self.format.two_level:
            outer = self.static[1].float()
            encode = (1.0 / (first * outer)).clamp(max=torch.finfo(torch.float32).max)
            return Scales(value, encode=e.f32(encode.numpy()), outer=e.f32(outer.numpy()))
        if self.format.zero_point:
            zero = self.static[1]
            return Scales(value, zero_code=e.u8(zero.numpy()), zero_point=e.f32(zero.numpy()))
        return Scales(value)

    def _spread(self, scale: ir.Value) -> ir.Value:
        """Scales as they broadcast against the grouped view."""
        assert self.format is not None
        return self.e.unsqueeze(scale, -1) if self.format.block is not None else scale

    @functools.cached_property
    def _grid(self) -> ir.Value:
        """Rounded values in units of the scale (zero point subtracted), grouped."""
        e, fmt, found = self.e, self.format, self.scales
        assert fmt is not None
        if found.fine:
            assert isinstance(fmt.element, FloatElement)
            units = e("Div", self._grouped, self._spread(found.scale))
            return rounding.round_fine(e, units, fmt.element)
        if found.encode is not None:
            units = e("Mul", self._grouped, self._spread(found.encode))
        elif fmt.rule in POWER_RULES and not self.static:
            units = e("Mul", self._grouped, self._spread(e("Reciprocal", found.scale)))
        else:
            units = e("Div", self._grouped, self._spread(found.scale))
        if found.zero_point is None:
            return rounding.round_to(e, units, fmt.element)
        assert isinstance(fmt.element, IntegerElement)
        zero = self._spread(found.zero_point)
        codes = e("Clip", e("Add", e("Round", units), zero), 0.0, float(fmt.element.levels))
        return e("Sub", codes, zero)

    @functools.cached_property
    def fake(self) -> ir.Value:
        """x̂ in float32, [..., K]."""
        if self.format is None:
            return self.x
        e, fmt = self.e, self.format
        if self._is_linear:
            codes = self.codes
            return e("DequantizeLinear", codes.codes, codes.scale, codes.zero)
        x = e("Mul", self._grid, self._spread(self.scales.scale))
        if self.scales.outer is not None:
            x = e("Mul", x, self.scales.outer)
        return x if fmt.block is None else e.join_last(x, self.rank, self.size, fmt.block[1])

    @property
    def _is_linear(self) -> bool:
        """Whether DequantizeLinear gives x̂ exactly."""
        fmt = self.format
        return fmt is not None and self.has_codes and fmt.granularity.kind == "tensor" \
            and fmt.element.max > 1.0

    def fake_of_channels(self, channels: int) -> ir.Value:
        """x̂ [N, channels, …] for a convolution, the one scale given per channel.

        Behind a DequantizeLinear of one scale onnxruntime rounds a convolution's float weights to
        8 bits of its own accord (its WeightBiasQuantization), whatever they are.
        """
        if not self._is_linear:
            return self.fake
        e, codes, shape = self.e, self.codes, self.e.ints(channels)
        scale, zero = (e("Expand", value, shape) for value in (codes.scale, codes.zero))
        return e("DequantizeLinear", codes.codes, scale, zero, axis=1)

    # ---- uint8 codes --------------------------------------------------------------------------

    @functools.cached_property
    def codes(self) -> Codes:
        """uint8 codes of an integer format with one scale for the tensor or one per row."""
        e, fmt = self.e, self.format
        assert fmt is not None and isinstance(fmt.element, IntegerElement) and self.has_codes
        plain = fmt.bits == 8 and fmt.scale.name == "f32" and fmt.element.unit == 1.0
        if fmt.zero_point and plain and not self.static:
            codes, scale, zero = e.builder.op("DynamicQuantizeLinear", self.x, outputs=3)
            return Codes(codes, zero, scale, by_row=False)
        scale = self.scales.scale
        if fmt.element.unit != 1.0:
            scale = e("Mul", scale, fmt.element.unit)
        if fmt.zero_point:
            assert self.scales.zero_code is not None
            codes = e.quantize_u8(self.x, scale, self.scales.zero_code)
            if fmt.bits != 8:
                codes = e("Clip", codes, e.u8(0), e.u8(fmt.element.levels))
            return Codes(codes, self.scales.zero_code, scale, by_row=False)
        by_row = fmt.granularity.kind == "row"
        if by_row:  # one block per row: every row has its own scale
            zero = e("Expand", e.u8(ZERO), e("Shape", scale))
            codes = e("QuantizeLinear", self.x, scale, zero, axis=-1, block_size=self.size)
        else:
            codes = e.quantize_u8(self.x, scale, ZERO)
        if self.static or fmt.rule != "exact" or fmt.scale.name != "f32":
            high = fmt.element.high  # only amax/max in float32 cannot saturate
            codes = e("Clip", codes, e.u8(ZERO - high), e.u8(ZERO + high))
        return Codes(codes, e.u8(ZERO), scale, by_row)

    # ---- limbs --------------------------------------------------------------------------------

    def limbs(self, count: int) -> Limbs:
        """At least ``count`` limbs; more, where the data needs them and the format allows it."""
        if count not in self._limbs:
            self._limbs[count] = self._make_limbs(count)
        return self._limbs[count]

    def _make_limbs(self, count: int) -> Limbs:
        e = self.e
        row = self._row(growing=count < MOST_LIMBS)
        # NaN survives no integer: a row that holds one gets a unit of NaN
        unit = e("Add", row.unit, self._poison(row))
        if count == MOST_LIMBS:
            codes, steps = _all_limbs(e, row)
        else:
            codes, steps = _Splitter(e, self._window, row).split(count, row.values, [])
        return Limbs(codes, steps, unit, row.outer)

    def _poison(self, row: _Row) -> ir.Value:
        """NaN in rows that hold what is not finite, 0 in others, [..., 1]."""
        e, fmt = self.e, self.format
        if fmt is None or fmt.block is None or self.scales.largest is None:
            total = e.reduce("ReduceSum", row.values, [-1])
            return e("Sub", total, total)
        if scales.keeps_infinity(fmt):
            return e("Sub", row.unit, row.unit)
        largest = self.scales.largest
        return e.reduce("ReduceSum", e("Sub", largest, largest), [-1], keep=True)

    def _window(self, count: int) -> float:
        """The smallest block scale, in units of the row, that ``count`` limbs hold exactly."""
        fmt = self.format
        assert fmt is not None
        step = _smallest(fmt) * 2.0**-fmt.scale.fraction_bits
        return BASE ** -(count - 1) / step

    def _row(self, growing: bool) -> _Row:
        """x̂ in units of its rows, which are powers of two wherever the format's scales are.

        growing: there may be more limbs than asked for.
        """
        e, fmt = self.e, self.format
        if fmt is not None and self.integer_rows:
            unit = 2.0 if fmt.zero_point else 1.0
            return _Row(e.unsqueeze(e("Mul", self._grid, 1.0 / unit), -2),
                        e("Mul", self.scales.scale, unit))
        if fmt is None or fmt.block is None:
            return _normalized(e, self.fake)
        found, gain = self.scales, _gain(fmt)
        top = e.reduce("ReduceMax", found.scale, [-1], keep=True)
        if fmt.rule not in POWER_RULES:
            top = e("Max", e.power_below(top), 2.0**-120)
        relative = e("Div", found.scale, top)
        values = e("Mul", self._grid, self._spread(relative))
        values = e.join_last(values, self.rank, self.size, fmt.block[1], as_row=True)
        lowest = None
        if growing and self.closes_exactly and found.largest is not None:
            empty = e("Equal", found.largest, 0.0)
            lowest = e.reduce("ReduceMin", e("Where", empty, 1.0, relative), None)
        return _Row(values, top, gain, found.outer, lowest, found.fine)

    # ---- float rows for a kernel that quantizes to int8 blocks itself --------------------------

    def pieces(self, count: int, block: int) -> ir.Value:
        """x̂ as a sum of ``count`` rows [..., count, K] (T2).

        All but the last are on a grid of amax/127 per block, so that a kernel which quantizes that
        way reproduces them; the last holds what is left, and alone is rounded by the kernel.
        """
        if count == 1:
            return self.fake
        key = (count, block)
        if key not in self._pieces:
            self._pieces[key] = self._make_pieces(count, block)
        return self._pieces[key]

    def _make_pieces(self, count: int, block: int) -> ir.Value:
        """Few nodes: these rows are for products so small that each node shows."""
        e, lead = self.e, [0] * (self.rank - 1)
        missing = -self.size % block
        rest = self.fake
        if missing:
            rest = e("Pad", rest, e.ints(*[0] * (2 * self.rank - 1), missing))
        rows: list[ir.Value] = []
        for _ in range(count - 1):
            blocks = e("Reshape", rest, e.ints(*lead, -1, block))
            largest = e.reduce("ReduceMax", e("Abs", blocks), [-1])
            step = e("Max", e("Mul", largest, 1.0 / 127.0), 2.0**-120)
            codes = e("QuantizeLinear", rest, step, axis=-1, block_size=block, output_dtype=INT8)
            rows.append(e("DequantizeLinear", codes, step, axis=-1, block_size=block))
            rest = e("Sub", rest, rows[-1])
        stacked = e("Concat", *rows, rest, axis=-1)
        stacked = e("Reshape", stacked, e.ints(*lead, count, self.size + missing))
        if missing:
            stacked = e("Slice", stacked, e.ints(0), e.ints(self.size), e.ints(-1))
        return stacked


def _gain(fmt: ScaledFormat) -> float:
    """What element values are multiplied by in the first limb, in the row's largest block.

    A block's scale is below ``headroom`` times the row's power of two.
    """
    headroom = 1.0 if fmt.rule in POWER_RULES else 2.0
    return 2.0 ** math.floor(math.log2(127.0 / (fmt.element.max * headroom)))


def _smallest(fmt: ScaledFormat) -> float:
    """The step of which every value of the element is a multiple."""
    if isinstance(fmt.element, FloatElement):
        return fmt.element.smallest
    assert isinstance(fmt.element, IntegerElement)
    return fmt.element.unit


@dataclasses.dataclass(frozen=True)
class _Row:
    """x̂ = outer · unit · values, in a form that limbs are cut from: |values·gain| ≤ 127·2^fine.

    values: [..., 1, K]; unit: [..., 1]; outer: () or None. lowest: the smallest scale of a block
    that is not zero, in units; it tells how many limbs are exact. None where there are no more
    limbs than asked for.
    """

    values: ir.Value
    unit: ir.Value
    gain: float = 1.0
    outer: ir.Value | None = None
    lowest: ir.Value | None = None
    fine: int = 0

    def steps(self, e: Emitter, count: int) -> ir.Value:
        """What limbs are multiplied by, [count], in units."""
        return e.f32([self.step(index) for index in range(count)])

    def step(self, index: int) -> float:
        """The worth of 1 in this limb, in units."""
        return math.ldexp(BASE**-index / self.gain, self.fine)


def _normalized(e: Emitter, x: ir.Value) -> _Row:
    """Rows in units of amax/127."""
    unit = e("Mul", scales.amax(e, x, [-1], keep=True), 1.0 / 127.0)
    unit = e("Max", unit, 2.0**-120)
    return _Row(e.unsqueeze(e("Div", x, unit), -2), unit)


@dataclasses.dataclass(frozen=True)
class _Splitter:
    """Cuts rows into limbs: as many as it is told, then as many more as the data needs.

    window: see ``Quantized._window``.
    """

    e: Emitter
    window: Callable[[int], float]
    row: _Row

    def split(self, count: int, rest: ir.Value, limbs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """(codes [..., L, K], steps [L]), L ≥ count; ``rest`` is what ``limbs`` lack."""
        index = len(limbs)
        scale = self.row.step(index)
        code = self.e.quantize_u8(rest, scale, ZERO)
        limbs = [*limbs, code]

        def more(total: int) -> Sequence[ir.Value]:
            value = self.e("DequantizeLinear", code, self.e.f32(scale), self.e.u8(ZERO))
            return self.split(total, self.e("Sub", rest, value), limbs)

        if index + 1 < count:
            return more(count)
        later = [stage for stage in STAGES if stage > count]
        if self.row.lowest is None or not later:
            return self._joined(limbs)
        short = self.e("Less", self.row.lowest, self.window(count) / self.row.gain)
        return self.e.builder.branch(short, lambda: more(later[0]), lambda: self._joined(limbs),
                             (ir.DataType.UINT8, ir.DataType.FLOAT))

    def _joined(self, limbs: Sequence[ir.Value]) -> Sequence[ir.Value]:
        e = self.e
        codes = e("Concat", *limbs, axis=-2) if len(limbs) > 1 else e("Identity", *limbs)
        # a branch must compute what it returns
        return codes, e("Identity", self.row.steps(e, len(limbs)))


def _all_limbs(e: Emitter, row: _Row) -> tuple[ir.Value, ir.Value]:
    """All limbs that there can be, in few nodes: (codes [..., L, K], steps [L]).

    Adding and subtracting a large number rounds to the step of each limb but the last; a limb is
    the difference of neighbours. All of it is exact.
    """
    count = MOST_LIMBS
    large = e.f32([[1.5 * 2.0**23 * row.step(index)] for index in range(count - 1)] + [[0.0]])
    rounded = e("Sub", e("Add", row.values, large), large)
    differences = np.eye(count) - np.eye(count, k=-1)
    steps = np.array([[row.step(index)] for index in range(count)])
    codes = e.quantize_u8(e("MatMul", e.f32(differences / steps), rounded), 1.0, ZERO)
    return codes, row.steps(e, count)
