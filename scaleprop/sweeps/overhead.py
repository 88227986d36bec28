"""What a recipe costs beside BF16: a model of the bytes that a training step's products move, of
what quantizing their factors adds, and of the operations of both. No clock is read.

For a product of a [m, k] and b [n, k] → [m, n] (fprop: m tokens, n outputs, k inputs):

    operand bytes     Σ over both factors of (element bits·elements + scale bits·scales)/8, and
                      4 for a scale of the whole tensor; 2·elements where a factor stays high
    result bytes      2·m·n, in BF16
    product work      2·m·n·k · width/16: a product is as fast as its wider factor, 4, 8, 16 or 32
                      bits an element; in operations at BF16's speed

and for each value that is quantized, once for all products that read the same codes of it:

    amax bytes        2·elements · f: one more reading, where a scale is of the whole tensor or of
                      a column; f = 1/D where it is held D steps, 0 where it is known before
                      (``delayed``, ``static``, ``constant``)
    quantize bytes    2·elements read, its codes and scales written. With ``of="quantized"`` what
                      is read are the codes and scales that fprop multiplied
    rotation work     2·h·elements · (1 + f), as products with blocks of h×h; again for its amax
    rotation bytes    0; rotated on the way. With ``fused=False`` 4·elements · (1 + f)
    random bytes      0; counted out (Philox), not stored. With ``fused=False`` n random bits an
                      element are written and read: 2·elements·n/8

Two products read the same codes if their operands are equal, nothing is rotated or random, and
scales are of whole tensors or of square tiles; else a value is quantized anew, as blocks of a
transpose are no transpose of blocks. Layers that share an input share its codes. Formats ``bf16``
and ``f16`` cost nothing to make; what a recipe leaves as it is counts as BF16, in ``fp32`` too.

``relative`` adds them up as a memory-bound step would see them, work divided by ``BALANCE``, and
divides by the same of BF16: 1 is as BF16, less is a saving. Attention's products are not counted,
nor rotations of gradients out of fprop's basis, and into it where they are estimated there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from scaleprop.errors import ConfigError
from scaleprop.formats import ScaledFormat, parse
from scaleprop.formats.elements import element
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN
from scaleprop.recipes.training import Operand, TrainingRecipe

# operations a byte, of BF16: 2.25 PFLOP/s dense over 8 TB/s (NVIDIA B200 data sheet, 2024)
BALANCE = 281.25
BF16_BYTES = 2
PLAIN_BITS: Mapping[str, int] = {"f32": 32, "bf16": 16, "f16": 16}
EDEN_BITS = 16  # random bits a scale, none an element; as the training graphs draw

Product = Literal["fprop", "dgrad", "wgrad"]


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a product, [rows, along]: ``along`` is summed over.

    kind: ``x`` an activation, ``w`` a parameter, ``dy`` a gradient. value: its name in the graph.
    """

    value: str
    kind: Literal["x", "w", "dy"]
    rows: int
    along: int

    @property
    def elements(self) -> int:
        return self.rows * self.along


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One product of a linear layer's training step.

    high: those names of a recipe's ``high`` that keep it high, of the ones that were asked for.
    """

    product: Product
    left: Factor
    right: Factor
    high: frozenset[str] = frozenset()

    @property
    def operations(self) -> int:
        """2·m·n·k."""
        return 2 * self.left.rows * self.right.rows * self.left.along

    @property
    def factors(self) -> tuple[Factor, Factor]:
        return self.left, self.right


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Bytes and operations of a step's products, and of the same step in BF16."""

    operand_bytes: float
    result_bytes: float
    amax_bytes: float
    quantize_bytes: float
    rotation_bytes: float
    random_bytes: float
    product_work: float
    rotation_work: float
    bf16_bytes: float  # of factors
    operations: float  # of products

    @property
    def extra_bytes(self) -> float:
        """What is read and written only because of the recipe."""
        return self.amax_bytes + self.quantize_bytes + self.rotation_bytes + self.random_bytes

    @property
    def operands(self) -> float:
        """Bytes of factors as the products read them, of BF16's."""
        return self.operand_bytes / self.bf16_bytes

    @property
    def passes(self) -> float:
        """Extra bytes in readings of the factors in BF16: how often more memory is gone over."""
        return self.extra_bytes / self.bf16_bytes

    @property
    def rotations(self) -> float:
        """Work of rotations, of the products' operations."""
        return self.rotation_work / self.operations

    @property
    def relative(self) -> float:
        """All of it, of BF16's: 1 is as BF16."""
        moved = self.operand_bytes + self.result_bytes + self.extra_bytes
        plain = self.bf16_bytes + self.result_bytes + self.operations / BALANCE
        return (moved + (self.product_work + self.rotation_work) / BALANCE) / plain

    def __mul__(self, share: float) -> Overhead:
        return Overhead(*(share * each for each in dataclasses.astuple(self)))

    def __add__(self, other: Overhead) -> Overhead:
        return Overhead(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other),
                                      strict=True)))


def linear_gemms(tokens: int, outputs: int, inputs: int, name: str = "w") -> tuple[Gemm, ...]:
    """The three products of one linear layer, y [tokens, outputs] = x [tokens, inputs]·wᵀ.

    Raises:
        ConfigError: for sizes below 1.
    """
    if min(tokens, outputs, inputs) < 1:
        raise ConfigError(f"a layer of {tokens} tokens, {outputs} outputs and {inputs} inputs: "
                          "each is at least 1")
    x, dy = f"input of {name}", f"gradient of {name}"
    return (
        Gemm("fprop", Factor(x, "x", tokens, inputs), Factor(name, "w", outputs, inputs)),
        Gemm("dgrad", Factor(dy, "dy", tokens, outputs), Factor(name, "w", inputs, outputs)),
        Gemm("wgrad", Factor(dy, "dy", outputs, tokens), Factor(x, "x", inputs, tokens)),
    )


def overhead(
    recipe: TrainingRecipe, gemms: Sequence[Gemm], *, steps: int | None = None, fused: bool = True
) -> Overhead:
    """What ``recipe`` costs on these products; see the module for every term.

    steps: of training; its phases are weighted by them, else only the first step's are counted.
    fused: rotations and random bits inside the quantizing kernels, or one operator after another.

    Raises:
        ConfigError: without products, or for less than 1 step.
    """
    if not gemms:
        raise ConfigError("no product of a linear layer to count")
    if steps is not None and steps < 1:
        raise ConfigError(f"steps={steps}: at least 1")
    starts = [0, *(phase.start for phase in recipe.phases if steps and phase.start < steps)]
    ends = [*starts[1:], steps or 1]
    total = sum(ends[-1:])
    parts = [_at(recipe, recipe.at(start), gemms, fused) * ((end - start) / total)
             for start, end in zip(starts, ends, strict=True)]
    return sum(parts[1:], parts[0])


def _at(
    recipe: TrainingRecipe, operands: Mapping[str, Operand], gemms: Iterable[Gemm], fused: bool
) -> Overhead:
    """The cost of one step with ``operands``."""
    every = element(recipe.every).bits if recipe.every else 0
    sums = dict.fromkeys((field.name for field in dataclasses.fields(Overhead)), 0.0)
    made: set[tuple[object, ...]] = set()
    for gemm in gemms:
        chosen = {} if gemm.high.intersection(recipe.high) else operands
        widths: list[int] = []
        for factor in gemm.factors:
            operand = chosen.get(f"{gemm.product}.{factor.kind}")
            widths.append(every or _width(operand))
            sums["operand_bytes"] += (factor.elements * every / 8 if every
                                      else stored_bytes(factor, operand))
            sums["bf16_bytes"] += BF16_BYTES * factor.elements
            key = (factor.value, operand, *_layout(gemm, factor, operand))
            if operand is not None and operand.format not in PLAIN and key not in made:
                made.add(key)
                source = chosen.get(f"fprop.{factor.kind}")
                for name, value in _making(factor, operand, source, fused).items():
                    sums[name] += value
        sums["operations"] += gemm.operations
        sums["product_work"] += gemm.operations * _speed(max(widths)) / 16
        sums["result_bytes"] += BF16_BYTES * gemm.left.rows * gemm.right.rows
    return Overhead(**sums)


def stored_bytes(factor: Factor, operand: Operand | None) -> float:
    """Codes and scales of ``factor`` in memory; blocks that are cut off have a scale too."""
    if operand is None or operand.format in PLAIN:
        return factor.elements * _width(operand) / 8
    fmt = parse(operand.format)
    bits = factor.elements * fmt.bits + _scales(factor, fmt) * fmt.scale.bits
    return bits / 8 + 4 * fmt.two_level


def _scales(factor: Factor, fmt: ScaledFormat) -> int:
    """How many scales ``factor`` has, those of the whole tensor on top not counted."""
    kind = fmt.granularity.kind
    if kind in ("block", "tile"):
        rows, columns = fmt.granularity.rows, fmt.granularity.columns
        return math.ceil(factor.rows / rows) * math.ceil(factor.along / columns)
    return {"tensor": 1, "row": factor.rows, "channel": factor.along}[kind]


def _making(
    factor: Factor, operand: Operand, source: Operand | None, fused: bool
) -> dict[str, float]:
    """What quantizing ``factor`` once moves and computes."""
    fmt, size = parse(operand.format), factor.elements
    again = _readings(operand, fmt)
    # fprop's codes of the same value: as many, whichever axis their blocks are along
    read = (stored_bytes(factor, source) if operand.of == "quantized"
            else BF16_BYTES * size)
    made = {
        "amax_bytes": read * again,
        "quantize_bytes": read + stored_bytes(factor, operand),
        "rotation_work": 2.0 * operand.hadamard * size * (1 + again),
    }
    if not fused:
        rotated = 2 * BF16_BYTES * size * (1 + again)
        made["rotation_bytes"] = rotated if operand.hadamard else 0.0
        made["random_bytes"] = 2 * _random_bits(factor, operand, fmt) / 8
    return made


def _readings(operand: Operand, fmt: ScaledFormat) -> float:
    """f: how many readings go before quantizing, to find scales of more than one row."""
    if fmt.granularity.kind == "channel":
        return 1.0
    if not (fmt.two_level or fmt.granularity.kind == "tensor"):
        return 0.0
    name, _, argument = operand.scaling.partition(":")
    if name == "current":
        return 1.0
    return 1 / int(argument) if name == "held" else 0.0


def _random_bits(factor: Factor, operand: Operand, fmt: ScaledFormat) -> float:
    if operand.rounding == "eden":
        return EDEN_BITS * _scales(factor, fmt)
    rounding = parse_rounding(operand.rounding)
    return rounding.bits * factor.elements if rounding.stochastic else 0.0


def _layout(gemm: Gemm, factor: Factor, operand: Operand | None) -> tuple[str, str]:
    """What tells two quantizations of a value apart: where it is summed, unless that is no matter.
    Random bits are drawn per role."""
    if operand is None or operand.format in PLAIN:
        return "", ""
    role = f"{gemm.product}.{factor.kind}"
    # tokens are what wgrad sums over, outputs what dgrad does
    along = gemm.product
    fmt = parse(operand.format)
    square = fmt.granularity.kind == "tile" and fmt.granularity.rows == fmt.granularity.columns
    if (fmt.granularity.kind == "tensor" or square) and not operand.hadamard:
        along = ""
    return along, role if operand.stochastic else ""


def _width(operand: Operand | None) -> int:
    """Bits of an element; BF16's where nothing is said."""
    if operand is None:
        return 8 * BF16_BYTES
    return PLAIN_BITS.get(operand.format) or parse(operand.format).bits


def _speed(bits: int) -> int:
    """The width that a product of elements of ``bits`` runs at: FP6 as FP8, 12 bits as BF16."""
    return next((width for width in (4, 8, 16, 32) if bits <= width), 64)
