"""Makes what products read: factors quantized, rotated and rounded as a recipe's operands say.

A rotation is of both factors of a product, which stays the same. Where fprop's factors are rotated
and their estimator is not ``ste``, gradients are brought to the rotated basis, estimated, and back;
those of products that read what fprop made of its factors are in that basis already.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import ops
from scaleprop.formats import parse
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import PLAIN
from scaleprop.formats.scales import target
from scaleprop.ops.estimators import parse_estimator
from scaleprop.ops.operands import exact_dtype
from scaleprop.passes.training.calls import call
from scaleprop.passes.training.matrices import Layer, Matrix, operand_matrix
from scaleprop.passes.training.memory import Memory, Streams
from scaleprop.passes.training.roles import Product
from scaleprop.recipes.training import Operand

aten: Any = torch.ops.aten
_COPY: Any = aten._to_copy.default
_PLAIN_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_EDEN_BITS = 16
_NOT_AGAIN = "forward quantized no such matrix: of the data instead of what that made"
_EVERYWHERE = 0  # the stream of signs that all layers share
_GET: Any = operator.getitem
QUANTIZED = "scaleprop_quantized"  # in a node's meta: (layer, role, operand) that it makes


@dataclasses.dataclass(frozen=True)
class Settings:
    """What operands read besides the data.

    operands: by role. names: parameter → its name, for streams and reports. seed: of random bits.
    step: the input that counts training steps, int64 [1]. memory: the inputs that hold amax from
    step to step. streams: the input that tells random numbers of operands apart. rank: which part
    of the batch this process has: parts are of one size.
    """

    operands: Mapping[str, Operand]
    names: Mapping[torch.fx.Node, str]
    seed: int
    step: torch.fx.Node
    memory: Memory
    streams: Streams
    rank: int = 0


@dataclasses.dataclass(frozen=True)
class Quantized:
    """One factor that a product reads in low precision.

    layer: its parameter's name. role: as in a recipe. value: the node that is quantized. axis: of
    the matrix that it is, or of a filter [outputs, the rest], that the product sums over. why:
    what of the operand was not done; "" where all was.
    """

    layer: str
    role: str
    value: str
    axis: int
    operand: Operand
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Data:
    """What a product reads for a factor: data, and what the product is multiplied by. amax: what
    the scale of the whole tensor was found by, where not by the value. rotated: the matrix and the
    operand of fprop in whose basis the data are, along the axis that the product keeps."""

    node: torch.fx.Node
    outer: torch.fx.Node | None = None
    prescale: float = 1.0
    amax: torch.fx.Node | None = None
    rotated: tuple[Matrix, Operand] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether a product of it is one of the value."""
        return self.outer is None and self.prescale == 1.0 and self.rotated is None


class Rewrite:
    """A joint graph while its products are given quantized factors.

    Made beside what it takes the place of, which ``replace`` takes out in the end.
    """

    def __init__(self, graph: torch.fx.Graph, settings: Settings) -> None:
        self.graph = graph
        self.settings = settings
        self.quantized: list[Quantized] = []
        self._top = next(node for node in graph.nodes if node.op != "placeholder")
        self._data: dict[Any, Data] = {}
        # (layer, kind) → what fprop reads
        self._forward: dict[tuple[str, str], tuple[Matrix, Operand, Data]] = {}
        self._made: dict[Any, torch.fx.Node] = {}  # rotations and signs
        # product → what takes its place; and what goes on reading the product itself
        self._results: dict[torch.fx.Node, torch.fx.Node] = {}
        self._kept: set[torch.fx.Node] = set()
        self._rotated: set[torch.fx.Node] = set()  # those whose result is in fprop's basis yet

    def multiply(self, layer: Layer, product: Product) -> None:
        """Make a product of quantized factors beside ``product``."""
        kinds = (product.left.kind, product.right.kind)
        if not any(f"{product.role}.{kind}" in self.settings.operands for kind in kinds):
            return
        node = product.node
        left, right = (self._factor(layer.name, product, kind) for kind in kinds)
        value = node.meta["val"]
        plain = left.is_plain and right.is_plain
        dtype = value.dtype if plain else torch.float32
        result = self.call(ops.gemm, (left.node, right.node, 1.0, dtype), node)
        basis = left.rotated or right.rotated
        result = self.restored(result, (left, right), torch.float32 if basis else value.dtype, node)
        estimated = product.role != "fprop" and self.estimates(
            "x" if product.role == "dgrad" else "w")
        if basis and estimated:
            self._rotated.add(node)  # ``estimate`` brings it back
        elif basis:
            axis = 0 if left.rotated else 1
            result = self._unrotate(result, basis, layer.name, node, axis=axis)
            result = self._cast(result, value.dtype, node)
        self._results[node] = result if estimated else self._plus(result, node)

    def _plus(
        self, result: torch.fx.Node, at: torch.fx.Node, place: torch.fx.Node | None = None
    ) -> torch.fx.Node:
        """``result`` and what the product ``at`` is added to, if anything."""
        if at.target is not aten.addmm.default:
            return result
        return self.call(aten.add.Tensor, (result, at.args[0]), at, place)

    def restored(
        self, result: torch.fx.Node, factors: Sequence[Data], dtype: torch.dtype,
        at: torch.fx.Node,
    ) -> torch.fx.Node:
        """A product of data, times what its factors were divided by."""
        outers = [data.outer for data in factors if data.outer is not None]
        if result.meta["val"].dtype.itemsize < 4 and not all(data.is_plain for data in factors):
            result = self.call(_COPY, (result,), at, kwargs={"dtype": torch.float32})
        if outers:
            outer = outers[0] if len(outers) == 1 else self.call(aten.mul.Tensor, tuple(outers), at)
            result = self.call(aten.mul.Tensor, (result, outer), at)
        prescale = math.prod(data.prescale for data in factors)
        if prescale != 1.0:
            result = self.call(aten.mul.Tensor, (result, 1.0 / prescale), at)
        return self._cast(result, dtype, at)

    def _cast(
        self, value: torch.fx.Node, dtype: torch.dtype, at: torch.fx.Node,
        place: torch.fx.Node | None = None,
    ) -> torch.fx.Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self.call(_COPY, (value,), at, place, {"dtype": dtype})

    def _factor(self, layer: str, product: Product, kind: str) -> Data:
        """A factor in the orientation that the product reads it in."""
        matrix = operand_matrix(product, kind)
        found = self.operand(layer, f"{product.role}.{kind}", matrix, product.node)
        if not matrix.transposed:
            return found
        return dataclasses.replace(found, node=self._turned(found.node, product.node))

    def operand(self, layer: str, role: str, matrix: Matrix, at: torch.fx.Node) -> Data:
        """What is read of ``matrix``, as it lies; itself where the recipe has nothing for it."""
        operand = self.settings.operands.get(role)
        if operand is None:
            return Data(matrix.base)
        key = (matrix.key, None if _symmetric(operand) else matrix.axis, operand,
               role if operand.stochastic else "", self._whose(layer, role, operand))
        if key not in self._data:
            self._data[key] = self._quantize(layer, role, matrix, operand, at)
            why = _NOT_AGAIN if operand.of == "quantized" and \
                self._before(layer, matrix, role) is None else ""
            self.quantized.append(Quantized(layer, role, matrix.base.name, matrix.axis, operand,
                                            why))
        if role.startswith("fprop"):
            self._forward[layer, role.rpartition(".")[2]] = (matrix, operand, self._data[key])
        return self._data[key]

    def _whose(self, layer: str, role: str, operand: Operand) -> str:
        """The layer whose signs are in data, its own or what fprop made; "" where none are."""
        before = self.settings.operands.get(f"fprop.{role.rpartition('.')[2]}")
        own = operand.signs == "layer" or (
            operand.of == "quantized" and before is not None and before.signs == "layer")
        return layer.partition("#")[0] if own else ""

    def _quantize(
        self, layer: str, role: str, matrix: Matrix, operand: Operand, at: torch.fx.Node
    ) -> Data:
        value, axis = matrix.base, matrix.axis
        if operand.format in PLAIN:
            dtype = _PLAIN_DTYPES[operand.format]
            made = self.call(_COPY, (value,), at, kwargs={"dtype": dtype})
            made.meta[QUANTIZED] = (layer, role, operand)
            return Data(made)
        basis = None
        if operand.of == "quantized":
            value, basis = self._again(layer, matrix, role, at)
        if operand.hadamard:
            value = self._rotate(value, operand, axis, layer, at)
        if parse_estimator(operand.estimator)[0].forward is not None:
            value = self.call(ops.softened, (value, operand.estimator, operand.format, axis), at)
        dtype = exact_dtype(operand.format)
        amax = None
        if operand.rounding == "eden":
            block = parse(operand.format).granularity.columns
            bits = self._bits(value, layer, role, _EDEN_BITS, at, {axis: block})
            made = self.call(ops.eden_operand, (value, operand.format, axis, bits,
                                                operand.hadamard, dtype), at)
        else:
            bits = None
            if operand.stochastic:
                width = parse_rounding(operand.rounding).bits
                bits = self._bits(value, layer, role, width, at)
            amax = self._amax(value, operand, f"{layer}/{role}", at)
            made = self.call(ops.quantize_operand, (
                value, operand.format, axis, operand.rounding, bits, amax, operand.prescale,
                operand.headroom, dtype), at)
        made.meta[QUANTIZED] = (layer, role, operand)
        outer = self.call(_GET, (made, 1), at) if _has_outer(operand) else None
        return Data(self.call(_GET, (made, 0), at), outer, operand.prescale, amax, basis)

    def _bits(
        self, value: torch.fx.Node, layer: str, role: str, width: int, at: torch.fx.Node,
        blocks: Mapping[int, int] | None = None,
    ) -> torch.fx.Node:
        """Random bits of each element, or of each block of so many along an axis; where it is in
        the whole batch is what they depend on."""
        shape = [self._blocks(self.size(value, axis, at), (blocks or {}).get(axis, 1), at)
                 for axis in (0, 1)]
        first: Any = 0
        if self.settings.rank and not role.endswith(".w"):
            rank = self.settings.rank
            first = rank * shape[0] if isinstance(shape[0], int) else self.call(
                operator.mul, (shape[0], rank), at)
        stream = self.settings.streams.of(_stream(layer, role), f"{layer}/{role}",
                                          lambda target, args: self.call(target, args, at))
        return self.call(ops.random_bits, (self.settings.step, stream, shape, self.settings.seed,
                                           width, first), at)

    def _blocks(self, size: Any, block: int, at: torch.fx.Node) -> Any:
        """How many blocks there are in a size, the last one broken or not."""
        if isinstance(size, int) or block == 1:
            return -(-size // block) if isinstance(size, int) else size
        more = self.call(operator.add, (size, block - 1), at)
        return self.call(operator.floordiv, (more, block), at)

    def size(self, value: torch.fx.Node, axis: int, at: torch.fx.Node) -> Any:
        """A size of a value; a node where it is symbolic."""
        size = value.meta["val"].shape[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, (value, axis), at)

    def _turned(
        self, value: torch.fx.Node, at: torch.fx.Node, place: torch.fx.Node | None = None
    ) -> torch.fx.Node:
        return self.call(aten.permute.default, (value, [1, 0]), at, place)

    def _rotate(
        self, value: torch.fx.Node, operand: Operand, axis: int, layer: str, at: torch.fx.Node,
        place: torch.fx.Node | None = None,
    ) -> torch.fx.Node:
        signs = self._signs(operand, layer)
        key = (value, axis, operand.hadamard, signs)
        if key in self._made:
            return self._made[key]
        made = self.call(ops.rotate, (value, operand.hadamard, signs, axis), at, place)
        if place is None:  # else layers come in forward order, and backward's is the reverse
            self._made[key] = made
        return made

    def _unrotate(
        self, value: torch.fx.Node, basis: tuple[Matrix, Operand], layer: str, at: torch.fx.Node,
        place: torch.fx.Node | None = None, axis: int | None = None,
    ) -> torch.fx.Node:
        """``value`` out of the basis of an operand, along its matrix's ``axis`` or another."""
        like, operand = basis
        size = self.size(like.base, like.axis, at)
        return self.call(ops.unrotate, (value, operand.hadamard, self._signs(operand, layer),
                                        like.axis if axis is None else axis, size), at, place)

    def _signs(self, operand: Operand, layer: str) -> Any:
        """Random signs; the same for both factors of a product."""
        if operand.signs == "none":
            return None
        stream = _EVERYWHERE
        if operand.signs == "layer":
            stream = _stream(layer.partition("#")[0], "signs")
        key = (operand.hadamard, operand.signs, stream)
        if key not in self._made:
            step = self.settings.step
            if operand.signs == "fixed" and operand.hadamard == 16:
                self._made[key] = self.call(ops.fixed_signs, (step,), step, self._top)
                return self._made[key]
            if operand.signs != "step":
                step = self.call(aten.zeros_like.default, (step,), step, self._top)
            self._made[key] = self.call(ops.random_signs, (
                step, operand.hadamard, self.settings.seed, stream), step, self._top)
        return self._made[key]

    def _again(
        self, layer: str, matrix: Matrix, role: str, at: torch.fx.Node
    ) -> tuple[torch.fx.Node, tuple[Matrix, Operand] | None]:
        """What fprop made of the value, and in whose basis it is; or the value."""
        before = self._before(layer, matrix, role)
        if before is None:
            return matrix.base, None
        mine, operand, data = before
        value = self.restored(data.node, (data,), torch.float32, at)
        return value, (mine, operand) if operand.hadamard else None

    def _before(
        self, layer: str, matrix: Matrix, role: str
    ) -> tuple[Matrix, Operand, Data] | None:
        """What fprop read for the same matrix, where it was quantized."""
        found = self._forward.get((layer, role.rpartition(".")[2]))
        return found if found is not None and found[0].key == matrix.key else None

    def _amax(
        self, value: torch.fx.Node, operand: Operand, name: str, at: torch.fx.Node
    ) -> Any:
        """The amax that the scale of the whole tensor is found by; None for the data's own."""
        kind, _, number = operand.scaling.partition(":")
        if kind == "current":
            return None
        if kind == "constant":
            fmt = parse(operand.format)
            largest = fmt.element.max * (target(fmt) if fmt.two_level else 1.0)
            kwargs = {"dtype": torch.float32, "device": value.meta["val"].device}
            return self.call(aten.full.default, ([], largest * 2.0 ** int(number)), at,
                             kwargs=kwargs)
        memory = self.settings.memory
        row = memory.row(name, operand.scaling)
        used = self.call(aten.slice.Tensor, (memory.used, 0, row, row + 1), at)
        now = self.call(aten.abs.default, (value,), at)
        if any(size == 0 for size in value.meta["val"].shape if isinstance(size, int)):
            now = self.call(aten.sum.default, (now,), at)  # 0: there is no largest one of none
        else:
            now = self.call(aten.amax.default, (now,), at)
        now = self.call(_COPY, (now,), at, kwargs={"dtype": torch.float32})
        now = self.call(aten.view.default, (now, [1]), at)
        memory.saw(row, now, backward="/fprop." not in name)
        known = self.call(aten.gt.Scalar, (used, 0.0), at)
        found = self.call(aten.where.self, (known, used, now), at)
        return self.call(aten.view.default, (found, []), at)

    def estimate(self, layer: Layer) -> None:
        """Bring the estimators of a layer's fprop factors into its gradients."""
        for kind, product in (("x", layer.dgrad), ("w", layer.wgrad)):
            if product is None or not self.estimates(kind):
                continue
            at, place = product.node, product.node.next
            gradient = self._results.get(at, at)
            if gradient is at and at.target is aten.addmm.default:
                gradient = self.call(aten.mm.default, at.args[1:3], at)
            readers = set(at.users)
            matrix = operand_matrix(layer.fprop, kind)
            # dx and dw have the axis that fprop sums over where dy is not
            turned = (1 if product.left.kind == "dy" else 0) != matrix.axis
            made = self._turned(gradient, at, place) if turned else gradient
            made = self.estimated(made, matrix, kind, layer.name, at, place,
                                  rotated=at in self._rotated)
            made = self._cast(made, at.meta["val"].dtype, at, place)
            made = self._turned(made, at, place) if turned else made
            self._results[at] = self._plus(made, at, place)
            if gradient is at:
                self._kept.update(set(at.users) - readers)

    def estimates(self, kind: str) -> bool:
        """Whether the gradient of fprop's factor is more than that of what it was quantized to."""
        operand = self.settings.operands.get(f"fprop.{kind}")
        return operand is not None and operand.estimator != "ste"

    def estimated(
        self, gradient: torch.fx.Node, matrix: Matrix, kind: str, layer: str, at: torch.fx.Node,
        place: torch.fx.Node, rotated: bool = False,
    ) -> torch.fx.Node:
        """The gradient of ``matrix`` from that of what fprop quantized it to, both as it lies;
        rotated: the latter in fprop's basis."""
        operand = self.settings.operands[f"fprop.{kind}"]
        value, dtype = matrix.base, gradient.meta["val"].dtype
        if operand.hadamard:
            value = self._rotate(value, operand, matrix.axis, layer, at, place)
            if not rotated:
                gradient = self._rotate(gradient, operand, matrix.axis, layer, at, place)
        before = self._before(layer, matrix, f"fprop.{kind}")
        amax = before[2].amax if before is not None else None
        gradient = self.call(ops.estimate, (
            gradient, value, operand.estimator, operand.format, matrix.axis, amax,
            operand.headroom, operand.prescale), at, place)
        if operand.hadamard:
            gradient = self._unrotate(gradient, (matrix, operand), layer, at, place)
        return self._cast(gradient, dtype, at, place)

    def once(self, key: Any, make: Callable[[], torch.fx.Node]) -> torch.fx.Node:
        """What was made for ``key`` before, or ``make`` makes now."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def replace(self) -> None:
        """Let everything read the new products."""
        for node, result in self._results.items():
            node.replace_all_uses_with(result, lambda user: user not in self._kept)
            if not node.users:
                self.graph.erase_node(node)

    def call(
        self, target: Any, args: tuple[Any, ...], at: torch.fx.Node,
        place: torch.fx.Node | None = None, kwargs: Mapping[str, Any] | None = None,
    ) -> torch.fx.Node:
        """A call that takes its provenance from ``at``, before it or another ``place``."""
        with self.graph.inserting_before(place or at):
            return call(self.graph, target, args, at, kwargs)


def _symmetric(operand: Operand) -> bool:
    """Whether quantizing a transpose is the transpose of quantizing."""
    if operand.hadamard or operand.estimator == "tanh":
        return False
    if operand.format in PLAIN:
        return True
    shape = parse(operand.format).granularity
    return shape.kind == "tensor" or (shape.kind == "tile" and shape.rows == shape.columns)


def _has_outer(operand: Operand) -> bool:
    fmt = parse(operand.format)
    return fmt.two_level or fmt.granularity.kind == "tensor"


def _stream(name: str, role: str) -> int:
    """The stream of random numbers of one operand of one layer: by their names, so that it is the
    same in every graph, run and process."""
    return zlib.crc32(f"{name}/{role}".encode())
