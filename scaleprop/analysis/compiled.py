"""What the numbers of a compiled model are, measured on its example inputs.

The scaled graph runs once, on the reference's operators, and nothing of it is kept but figures.
Weights are read back from what is stored, a few rows at a time: their figures are those of x̂.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop._torch_compat import traced_size
from scaleprop.analysis.ranges import LIMITS, is_moved, lost_above, lost_below
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import source_line
from scaleprop.formats import ScaledTensor, error_statistics
from scaleprop.formats.scaled import PLAIN
from scaleprop.formats.scales import decoded_scale
from scaleprop.formats.statistics import in_units
from scaleprop.passes.base import Program
from scaleprop.passes.error import rows_of
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.provenance import innermost_module
from scaleprop.passes.statistics import Measured, Watch, factors, own_random_state, predict
from scaleprop.report.records import TensorRecord, Values
from scaleprop.report.scales import FORMATS, Phase, ScaleReport, TensorScale
from scaleprop.rules import contraction_of
from scaleprop.rules.moments import Moments, limit

aten: Any = torch.ops.aten

Node = torch.fx.Node

_PIECE = 1 << 18  # elements of a weight that are read back at a time
_EMBEDDING = "aten.embedding.default"


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What one quantization did to what it read: see ``TensorRecord`` and ``Values``."""

    sqnr_db: float
    saturated: float
    underflowed: float
    scaled: Mapping[int, int]
    scales: tuple[float, float]

    @classmethod
    def of(cls, x: torch.Tensor, scaled: ScaledTensor) -> Rounded:
        """Of ``x``, that ``scaled`` was made from."""
        units = Measured.of(in_units(x, scaled))
        return cls(*error_statistics(x, scaled), units.exponents, _scale_range(scaled))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a run of the compiled model gave.

    records: those of the program, with ``values`` and what their quantization lost. scales: the
    values through depth, forward. read: node → the activation that it reads, before rounding;
    rounded: node → what rounding that did. magnitudes: of the activations of ``wanted`` nodes.
    """

    records: tuple[TensorRecord, ...]
    scales: ScaleReport
    read: Mapping[str, Measured]
    rounded: Mapping[str, Rounded]
    magnitudes: Mapping[str, torch.Tensor]


def look_at_compiled(
    program: Program, name: str, wanted: frozenset[str] = frozenset(), progress: bool = False
) -> Numbers:
    """Run ``program`` once on its example inputs, on the reference, and measure it.

    name: what the scale report says was looked at. wanted: nodes whose activation's channels are
    measured too. progress: show a bar on standard error.
    """
    module = program.module
    operands = {node: Operand.of(node) for node in module.graph.nodes
                if node.op == "call_function"}
    watched = {one.source: one.axis for node, one in operands.items()
               if node.name in wanted and one.source is not None}
    leaves = program.example_leaves
    with progress_bar(progress, len(module.graph.nodes), "measuring") as update:
        look = _Look(module, watched, update)
        with torch.no_grad(), compat.without_modes(), own_random_state(module.graph, leaves):
            torch.manual_seed(0)
            look.run(*leaves, enable_io_processing=False)
        weights = _weights(program, operands)
    given = {**look.given, **{node: _moments(seen) for node, seen in look.measured.items()
                              if node in look.learned},
             **{node: _moments(weights[part].measured) for node in module.graph.nodes
                if (part := _part_of(node)) in weights}}
    predicted = predict(module.graph, given)
    rows = _Rows(module.graph, look, operands, weights, {
        node: moments.rms for node, moments in predicted.moments.items() if node not in given})
    return Numbers(
        records=tuple(map(rows.filled, program.records)),
        scales=ScaleReport(
            model=name, tensors=rows.rows(), unknown=dict(predicted.unknown),
            notes=("one run of the compiled model on its example inputs, in the reference's "
                   "arithmetic: values are those that rounded operands make",
                   "given, not predicted: parameters as they are stored, inputs, and what depends "
                   "on neither")),
        read={node.name: look.measured[one.source] for node, one in operands.items()
              if one.source in look.measured},
        rounded={node.name: look.extra[one.quantizer] for node, one in operands.items()
                 if one.quantizer in look.extra},
        magnitudes={node.name: look.magnitudes[one.source] for node, one in operands.items()
                    if one.source in look.magnitudes})


@dataclasses.dataclass(frozen=True)
class Operand:
    """What an operator reads: its activation before rounding, the axis of that one's channels, and
    what rounds it; the stored parts of its weight, their format and their columns."""

    source: Node | None = None
    axis: int = -1
    quantizer: Node | None = None
    parts: tuple[Node, ...] = ()
    format: str = ""
    columns: int = 0

    @classmethod
    def of(cls, node: Node) -> Operand:
        """Of a call; empty for one that reads nothing that is known here."""
        args: Any = node.args
        if node.target is SCALED_MM:
            x, w, _, _, name, k = args
            source, quantizer = _unrounded(x[0] if isinstance(x, list | tuple) else x)
            parts = _stored(w) if name not in PLAIN else ()
            return cls(source, -1, quantizer, parts, name, k)
        if node.target is DEQUANTIZE:  # rows of a table
            return cls(parts=_stored(args[0]), format=args[1], columns=args[2][-1])
        inputs: list[Node] = [arg for arg in args if isinstance(arg, Node)]
        source, quantizer = _unrounded(inputs[0]) if inputs else (None, None)
        made: Any = next((one for one in map(_restored, inputs[1:]) if one is not None), None)
        if made is None:
            return cls(source, _channel_axis(node), quantizer)
        return cls(source, _channel_axis(node), quantizer, _stored(made.args[0]), made.args[1],
                   made.args[2][-1])


def _channel_axis(node: Node) -> int:
    contraction = contraction_of(node)
    operand = contraction.operand("activation") if contraction is not None else None
    return operand.axes[0] if operand is not None and operand.axes else -1


def _unrounded(node: Node) -> tuple[Node, Node | None]:
    """The value behind a quantization, and that quantization."""
    if node.target in (QUANTIZE, FAKE_QUANTIZE):
        source: Any = node.args[0]
        return source, node
    return node, None


def _restored(node: Node) -> Node | None:
    """The dequantization of a weight behind views of it."""
    while is_moved(node):
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is DEQUANTIZE else None


def _part_of(node: Node) -> Node:
    """The buffer that ``node`` is, or holds rows of."""
    while node.target is aten.index.Tensor:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _stored(parts: Any) -> tuple[Node, ...]:
    """The buffers of parts, of which rows may have been taken."""
    found = [_part_of(part) for part in parts] if isinstance(parts, list | tuple) else []
    return tuple(found) if all(part.op == "get_attr" for part in found) else ()


class _Look(Watch):
    """One run of a scaled graph: every float value but the stored parts of operands.

    learned: parameters, and those parts. wanted: values of which ‖x[…, k]‖ over all else is kept →
    the channels' axis.
    """

    def __init__(
        self, module: torch.fx.GraphModule, wanted: Mapping[Node, int],
        update: Callable[[int], None],
    ) -> None:
        self._parts = _parts(module.graph)
        self.learned = {node for node in module.graph.nodes if node.op == "get_attr"
                        and (node in self._parts or not _is_mask(get_tensor(module, node)))}
        super().__init__(module, dict.fromkeys(self.learned, ""), set(), _rounding, LIMITS)
        self.magnitudes: dict[Node, torch.Tensor] = {}
        self._wanted, self._update, self._done = wanted, update, 0

    def run_node(self, n: Node) -> Any:
        """The node's value, after a look at it."""
        value = super().run_node(n)
        self._done += 1
        self._update(self._done)
        return value

    def keep(self, node: Node, value: torch.Tensor) -> None:
        """Note what is known of one value; of parts, nothing."""
        if node in self._parts:
            return
        super().keep(node, value)
        if node in self._wanted and value.dim():
            self.magnitudes[node] = channel_magnitudes(value, self._wanted[node])


def channel_magnitudes(x: torch.Tensor, axis: int) -> torch.Tensor:
    """[K] float64: ‖x[…, k]‖ over all other axes."""
    channels = x.detach().movedim(axis, -1)
    return torch.linalg.vector_norm(
        channels.reshape(-1, channels.shape[-1]), dim=0, dtype=torch.float64).cpu()


def _rounding(
    node: Node, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Rounded | None:
    """What a quantization did to its argument."""
    if node.target not in (QUANTIZE, FAKE_QUANTIZE):
        return None
    parts = value if node.target is QUANTIZE else QUANTIZE(*args, **kwargs)
    x, name, axis = args[:3]
    return Rounded.of(x, ScaledTensor.from_parts(parts, name, x.shape, axis, x.dtype))


def _parts(graph: torch.fx.Graph) -> frozenset[Node]:
    """What holds the stored parts of operands: codes, scales, and rows of them."""
    found: set[Node] = set()
    for node in graph.nodes:
        lists: list[Any] = []
        if node.target is SCALED_MM:
            lists = [arg for arg, name in zip(node.args[:2], node.args[3:5], strict=True)
                     if name not in PLAIN]
        elif node.target is DEQUANTIZE:
            lists = [node.args[0]]
        elif node.target in (QUANTIZE, FAKE_QUANTIZE):
            lists = list(node.args[5:6])
        for part in (part for parts in lists if isinstance(parts, list | tuple) for part in parts):
            found.add(part)
            while part.target is aten.index.Tensor:
                part = part.args[0]
                found.add(part)
    return frozenset(found)


def get_tensor(module: torch.fx.GraphModule, node: Node) -> torch.Tensor:
    """What a ``get_attr`` node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _is_mask(tensor: torch.Tensor) -> bool:
    """Whether it is no float, or some of it stands for −∞: what is added to scores has that."""
    if not tensor.is_floating_point():
        return True
    plain = tensor.dtype.itemsize > 1 and tensor.numel() > 0
    return plain and float(tensor.detach().min()) <= -limit(tensor.dtype)


def _moments(seen: Measured) -> Moments:
    return Moments(seen.mean, seen.rms, zeros=seen.zeros, masked=seen.masked)


# -- weights, as they are stored


@dataclasses.dataclass(frozen=True)
class _Weight:
    """x̂ of a stored weight; ``scaled`` and ``scales`` as ``Values`` has them."""

    measured: Measured
    scaled: Mapping[int, int]
    scales: tuple[float, float]

    @classmethod
    def of(cls, scaled: ScaledTensor) -> _Weight:
        """Read back a few rows at a time."""
        measured = Measured.of_pieces(piece.dequantize() for piece in _pieces(scaled))
        units = Measured.of_pieces(piece.values() for piece in _pieces(scaled))
        return cls(measured, units.exponents, _scale_range(scaled))


def _weights(program: Program, operands: Mapping[Node, Operand]) -> dict[Node, _Weight]:
    """First part of each stored weight → what it is."""
    found: dict[Node, _Weight] = {}
    for operand in operands.values():
        if not operand.parts or operand.parts[0] in found:
            continue
        parts = [get_tensor(program.module, part) for part in operand.parts]
        shape = (parts[0].shape[0], operand.columns)
        found[operand.parts[0]] = _Weight.of(ScaledTensor.from_parts(parts, operand.format, shape))
    return found


def _pieces(scaled: ScaledTensor) -> Iterator[ScaledTensor]:
    tile = scaled.format.granularity.rows
    rows = max(_PIECE // max(scaled.shape[-1], 1) // tile, 1) * tile
    for start in range(0, scaled.shape[0], rows):
        count = min(rows, scaled.shape[0] - start)
        yield rows_of(scaled, start, torch.Size((count, scaled.shape[1])))


def _scale_range(scaled: ScaledTensor) -> tuple[float, float]:
    scale = decoded_scale(scaled.scale, scaled.format).double()
    if not scale.numel():
        return 0.0, 0.0
    outer = 1.0 if scaled.tensor_scale is None else float(scaled.tensor_scale)
    low, high = torch.aminmax(scale)
    return float(low) * outer, float(high) * outer


# -- what the report says of it


class _Rows:
    """What was measured, as records and as rows through depth."""

    def __init__(
        self, graph: torch.fx.Graph, look: _Look, operands: Mapping[Node, Operand],
        weights: Mapping[Node, _Weight], predicted: Mapping[Node, float],
    ) -> None:
        self._look, self._weights, self._predicted = look, weights, predicted
        nodes: list[Node] = list(graph.nodes)
        self._nodes: dict[str, Node] = {node.name: node for node in nodes}
        self._parameters = {str(node.target): node for node in nodes if node.op == "get_attr"}
        self._operands = {node.name: operand for node, operand in operands.items()}
        self._read = {read for node in nodes for read in factors(node)} | {
            operand.source for operand in operands.values()
            if operand.parts or operand.quantizer is not None}

    def filled(self, record: TensorRecord) -> TensorRecord:
        """``record`` with what its numbers are; as it was where they are not in the graph."""
        operand = self._operands.get(record.node, Operand())
        if record.scale_kind == "weight":
            weight = self._weights.get(operand.parts[0]) if operand.parts else None
            if weight is None:
                return record
            return dataclasses.replace(record, values=values_of(
                weight.measured, scaled=weight.scaled, scales=weight.scales))
        node = self._parameters.get(record.operand) or self._nodes.get(record.operand)
        if node is None and record.op != _EMBEDDING:
            node = operand.source
        seen = self._look.measured.get(node) if node is not None else None
        if node is None or seen is None:
            return record
        predicted = self._predicted.get(node)
        lost: Rounded | None = (None if operand.quantizer is None or record.format is None
                                else self._look.extra[operand.quantizer])
        if lost is None:
            return dataclasses.replace(record, values=values_of(seen, predicted))
        return dataclasses.replace(
            record, values=values_of(seen, predicted, lost.scaled, lost.scales),
            sqnr_db=lost.sqnr_db if record.sqnr_db is None else record.sqnr_db,
            saturated=lost.saturated if record.saturated is None else record.saturated,
            underflowed=lost.underflowed if record.underflowed is None else record.underflowed)

    def rows(self) -> tuple[TensorScale, ...]:
        """Every float value that does not only move another's elements, in graph order; of what is
        made of parameters alone, those parameters."""
        constant: set[Node] = set()
        found: list[TensorScale] = []
        for node in self._nodes.values():
            if node.op == "get_attr" or (node.op == "call_function" and node.all_input_nodes
                                         and constant.issuperset(node.all_input_nodes)):
                constant.add(node)
            known = node.op == "get_attr" or node not in constant
            is_same = is_moved(node) or node.target is FAKE_QUANTIZE
            if known and node in self._look.measured and not is_same:
                found.append(self._row(node, self._look.measured[node]))
        return tuple(found)

    def _row(self, node: Node, seen: Measured) -> TensorScale:
        value: Any = node.meta["val"]
        phase: Phase = {"get_attr": "parameter", "placeholder": "input"}.get(  # type: ignore[assignment]
            node.op, "forward")
        is_call = node.op == "call_function"
        return TensorScale(
            node=node.name, op=str(node.target) if is_call else "", phase=phase,
            name=str(node.target) if node.op == "get_attr" else "",
            shape=tuple(traced_size(size) for size in value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            source=source_line(node) if is_call else "", module=innermost_module(node),
            read_in=("forward",) if node in self._read else (), count=seen.count, amax=seen.amax,
            rms=seen.rms, mean=seen.mean, kurtosis=seen.kurtosis, zeros=seen.zeros,
            masked=seen.masked, nonfinite=seen.nonfinite, exponents=seen.exponents,
            predicted=self._predicted.get(node),
            underflow={name: lost_below(seen, name) for name in FORMATS},
            overflow={name: lost_above(seen, name) for name in FORMATS})


def values_of(
    seen: Measured, predicted: float | None = None, scaled: Mapping[int, int] | None = None,
    scales: tuple[float, float] | None = None,
) -> Values:
    """What was measured, as a record has it."""
    return Values(
        count=seen.count, amax=seen.amax, rms=seen.rms, mean=seen.mean, kurtosis=seen.kurtosis,
        zeros=seen.zeros, nonfinite=seen.nonfinite + seen.masked, exponents=seen.exponents,
        scaled=scaled or {}, scales=scales, predicted=predicted)
