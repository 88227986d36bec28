"""Quantize weights: parameters become packed codes and scales, operators become scaled ones.

    linear(x, w, b)    →  scaled_mm([x], [codes, scale, …], b, "f32", format, K)
    conv(x, w, b)      →  conv(x, view(dequantize([codes, scale, …])), b)
    embedding(w, ids)  →  dequantize([codes[ids], scale[ids], …])

Weights that ``solve-weights`` solved are stored as they are, to the last bit. One weight at a time,
so that the peak is the source plus what is quantized already. A tensor used twice in one format is
stored once.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.fx

from scaleprop.calibration.statistics import TensorStatistics
from scaleprop.errors import (
    CalibrationError,
    ConfigError,
    PassError,
    PostconditionError,
    PreconditionError,
    describe,
    source_line,
)
from scaleprop.formats import ScaledFormat, ScaledTensor, parse, quantize
from scaleprop.formats.scales import tensor_scale_of, whole_amax
from scaleprop.passes.assign import ASSIGNMENT, Assignment, assignment_of
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.compensation import DAMPING, compensated
from scaleprop.passes.error import weight_error
from scaleprop.passes.operators import DEQUANTIZE, SCALED_MM
from scaleprop.passes.provenance import innermost_module, statistic_of
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.solving.solved import solved_of
from scaleprop.recipes.base import Role
from scaleprop.report.records import Role as RecordRole
from scaleprop.report.records import ScaleProvenance, TensorRecord

logger = logging.getLogger(__name__)

aten = torch.ops.aten
VERSION = 1  # of what weights become; what an older one left on a shelf is made anew
_CHUNK = 1 << 18  # elements quantized at a time
_SMALL_CHUNK = 1 << 16  # where memory is short: temporaries are smaller than ``memory`` asks for
PLAIN_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclasses.dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store assigned weights in their formats.

    clipping: ``amax`` or ``mse`` for all weights; None: as the recipe says per role.
    rounding: ``nearest`` for all weights, or ``compensated`` for those of linear operators (needs
        calibration, see ``compensation``); None: as the recipe says per role.
    damping: of compensated rounding, in units of the mean of the second moments.
    seed: for recipes that round weights stochastically.
    """

    clipping: Literal["amax", "mse"] | None = None
    rounding: Literal["nearest", "compensated"] | None = None
    damping: float = DAMPING
    seed: int = 0

    name: ClassVar[str] = "quantize-weights"
    one_by_one: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for a damping that is no number from 0."""
        given: Any = self.damping
        if isinstance(given, bool) or not isinstance(given, (int, float)) or not given >= 0:
            raise ConfigError(f"damping={given!r} must be a number, at least 0; {DAMPING} is usual")

    def requires(self, program: Program) -> None:
        """Formats must have been assigned, even if to nothing."""
        if not program.is_assigned:
            raise PreconditionError("no formats are assigned; run assign-formats first")

    def run(self, program: Program) -> PassResult:
        """The program with scaled operators, and a record per weight."""
        work = _Weights(Rewriter(program, self.name), self)
        assigned = [
            (node, assignment)
            for node in work.rewriter.graph.nodes
            if (assignment := assignment_of(node)) is not None
        ]
        for node, assignment in assigned:
            work.note_moment(node, assignment)
        for node, assignment in assigned:
            work.rewrite(node, assignment)
        result = work.rewriter.finish()
        result = result.replace(
            records=(*result.records, *work.records), statistics=_slim(result.statistics)
        )
        notes = [f"{len(work.records)} weights quantized"]
        if work.solved:
            notes.append(f"{work.solved} weights as solve-weights solved them")
        if work.compensated:
            notes.append(
                f"{work.compensated} weights rounded with compensation: closer outputs, though "
                "the weights' own SQNR is lower than with rounding to nearest"
            )
        return PassResult(result, work.rewriter.modified, tuple(notes))

    def ensures(self, program: Program) -> None:
        """Every operator with an assigned weight reads it in its format."""
        for node in program.module.graph.nodes:
            assignment = assignment_of(node)
            is_left = assignment is not None and assignment.contraction.kind != "conv"
            if is_left and node.target not in (SCALED_MM, DEQUANTIZE):
                raise PostconditionError(f"{describe(node)} was assigned a format and has none")


class _Weights:
    """The pass at work: the graph, what is stored already, and the records so far."""

    def __init__(self, rewriter: Rewriter, options: QuantizeWeights) -> None:
        self.rewriter = rewriter
        self.options = options
        self.records: list[TensorRecord] = []
        self._stored: dict[Any, tuple[list[torch.fx.Node], int, dict[str, Any]]] = {}
        self._generator = torch.Generator().manual_seed(options.seed)
        self._moments: dict[Any, torch.Tensor] = {}
        self.compensated = self.solved = 0

    def role(self, assignment: Assignment) -> Role | None:
        """The weight's role, with the rounding that the pass's options ask for."""
        role, rounding = assignment.weight, self.options.rounding
        is_linear = assignment.contraction.kind == "linear"
        if role is None or rounding is None or (rounding == "compensated" and not is_linear):
            return role
        return dataclasses.replace(role, rounding=rounding)

    def note_moment(self, node: torch.fx.Node, assignment: Assignment) -> None:
        """Keep the second moment of what a compensated weight is multiplied with, all uses summed.

        Raises:
            CalibrationError: where calibration has not seen it.
        """
        role = self.role(assignment)
        if role is None or role.rounding != "compensated" or solved_of(node) is not None:
            return
        x, w = assignment.argument(node, "activation"), assignment.argument(node, "weight")
        seen = self.rewriter.program.statistics.get(x.name)
        if seen is None or seen.second_moment is None:
            raise CalibrationError(
                f"{describe(node)}: its weight's rounding is 'compensated', and calibration kept "
                f"no second moment of its input {x.name!r}. Remedy: pass calibration= (example "
                "inputs without padding), or rounding='nearest'"
            )
        key = self._key(node, w, role)
        earlier = self._moments.get(key)
        self._moments[key] = (
            seen.second_moment if earlier is None else earlier + seen.second_moment
        )

    def rewrite(self, node: torch.fx.Node, assignment: Assignment) -> None:
        rewrites: dict[str, Callable[[torch.fx.Node, Assignment], None]] = {
            "linear": self._linear,
            "conv": self._conv,
            "embedding": self._embedding,
        }
        rewrites[assignment.contraction.kind](node, assignment)

    def _linear(self, node: torch.fx.Node, assignment: Assignment) -> None:
        x, w = assignment.argument(node, "activation"), assignment.argument(node, "weight")
        k = w.meta["val"].shape[-1]
        parts, name = [w], PLAIN_NAMES[w.meta["val"].dtype]
        role = self.role(assignment)
        if role is not None:
            parts, name = self._parts(node, w, role)
        why = f"the weight of {node.name} is {name}"
        x_name = PLAIN_NAMES[x.meta["val"].dtype]
        bias = assignment.argument(node, "bias")
        args = ([x], parts, bias, x_name, name, k)
        product = self.rewriter.call(SCALED_MM, args, at=node, why=why)
        product.meta[ASSIGNMENT] = assignment
        self._record(product, node, w, role, "fprop.w")
        self.rewriter.renamed[node.name] = product.name
        self.rewriter.replace(node, self._as_dtype(product, node))

    def _conv(self, node: torch.fx.Node, assignment: Assignment) -> None:
        w, role = assignment.argument(node, "weight"), self.role(assignment)
        if role is None:
            return
        shape = list(w.meta["val"].shape)
        parts, name = self._parts(node, w, role)
        why = f"the weight of {node.name} is {name}"
        flat = [shape[0], w.meta["val"].numel() // shape[0]]
        restore = (parts, name, flat, -1, w.meta["val"].dtype)
        weight = self.rewriter.call(DEQUANTIZE, restore, at=node, why=why)
        if len(shape) != 2:
            weight = self.rewriter.call(aten.view.default, (weight, shape), at=node, why=why)
        node.replace_input_with(w, weight)
        self.rewriter.modified = True
        self._record(node, node, w, role, "fprop.w")

    def _embedding(self, node: torch.fx.Node, assignment: Assignment) -> None:
        w: Any = node.args[0]
        ids, role = node.args[1], self.role(assignment)
        if role is None or not isinstance(ids, torch.fx.Node):
            return
        parts, name = self._parts(node, w, role)
        why = f"the table of {node.name} is {name}"
        width = w.meta["val"].shape[-1]
        rows = [
            self.rewriter.call(aten.index.Tensor, (part, [ids]), at=node, why=why)
            if part.meta["val"].ndim
            else part
            for part in parts
        ]
        sizes = [
            self.rewriter.call(aten.sym_size.int, (ids, axis), at=node, why=why)
            if isinstance(size, torch.SymInt)
            else size
            for axis, size in enumerate(ids.meta["val"].shape)
        ]
        restore = (rows, name, [*sizes, width], -1, node.meta["val"].dtype)
        value = self.rewriter.call(DEQUANTIZE, restore, at=node, why=why)
        value.meta[ASSIGNMENT] = assignment
        self._record(value, node, w, role, "embedding")
        self.rewriter.replace(node, value)

    def _as_dtype(self, product: torch.fx.Node, node: torch.fx.Node) -> torch.fx.Node:
        """scaled_mm returns float32; the model may compute in a narrower type."""
        dtype = node.meta["val"].dtype
        if product.meta["val"].dtype == dtype:
            return product
        cast: Any = getattr(aten, "_to_copy").default  # noqa: B009
        why = f"{node.name} was {dtype}"
        return self.rewriter.call(cast, (product,), {"dtype": dtype}, at=node, why=why)

    def _parts(
        self, node: torch.fx.Node, w: torch.fx.Node, role: Role
    ) -> tuple[list[torch.fx.Node], str]:
        """``get_attr`` nodes of the stored parts, and the format's name."""
        fmt = parse(role.format)
        key = self._key(node, w, role)
        if key not in self._stored:
            tensors, errors = self._shelved(node, w, role, key)
            names = part_names(fmt)
            how = "solved" if solved_of(node) is not None else f"rounding {role.rounding}"
            why = f"{w.target} in {fmt}, {how}"
            parts = [
                self.rewriter.constant(part, f"{w.target}_{part_name}", at=node, why=why)
                for part, part_name in zip(tensors, names, strict=True)
            ]
            self._stored[key] = (parts, sum(part.nbytes for part in tensors), errors)
            logger.debug("%s: %s", w.target, fmt)
        return self._stored[key][0], str(fmt)

    def _shelved(
        self, node: torch.fx.Node, w: torch.fx.Node, role: Role, key: Any
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """The stored parts and their errors; from the program's shelf where it has them."""
        tensor, shelf = self.rewriter.tensor(w), self.rewriter.program.shelf
        if tensor is None:
            raise PreconditionError(f"{describe(node)}: its weight is no parameter any more")
        if shelf is None or role.rounding != "nearest" or solved_of(node) is not None:
            return self._made(node, tensor, role, key)
        clipping = self.options.clipping or role.clipping
        how = f"{parse(role.format).long_name} {clipping} {VERSION}"
        found = shelf.find(tensor, how)
        if found is None:
            parts, errors = self._made(node, tensor, role, key)
            found = shelf.keep(tensor, how, parts, errors), errors
        return found

    def _made(
        self, node: torch.fx.Node, tensor: torch.Tensor, role: Role, key: Any
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """The stored parts that a weight becomes, and their errors."""
        matrix, fmt = tensor.detach().flatten(1), parse(role.format)
        if (solved := solved_of(node)) is not None:
            scaled = self._as_solved(node, matrix, fmt, solved)
        elif role.rounding == "compensated":
            scaled = self._compensate(node, matrix, fmt, role, key)
        else:
            drawn = self._generator if role.rounding == "stochastic" else None
            is_short = drawn is None and self.rewriter.program.shelf is not None
            scaled = quantized_matrix(matrix, role, self.options.clipping, drawn,
                                      _SMALL_CHUNK if is_short else None)
        return scaled.parts, weight_error(matrix, scaled)

    def _key(self, node: torch.fx.Node, w: torch.fx.Node, role: Role) -> Any:
        tensor = self.rewriter.tensor(w)
        place = None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride())
        rounding = role.rounding if solved_of(node) is None else "solved"
        return place, role.format, rounding, self.options.clipping or role.clipping

    def _as_solved(
        self, node: torch.fx.Node, matrix: torch.Tensor, fmt: ScaledFormat, solved: ScaledTensor
    ) -> ScaledTensor:
        if solved.format != fmt or solved.shape != matrix.shape:
            raise PreconditionError(
                f"{describe(node)}: its weight, {list(matrix.shape)} in {fmt}, was solved as "
                f"{list(solved.shape)} in {solved.format}. Remedy: solve-weights comes right "
                "before quantize-weights"
            )
        self.solved += 1
        return solved

    def _compensate(
        self, node: torch.fx.Node, matrix: torch.Tensor, fmt: ScaledFormat, role: Role, key: Any
    ) -> ScaledTensor:
        clipping = self.options.clipping or role.clipping
        moment = self._moments.pop(key)
        self.compensated += 1
        try:
            return compensated(matrix, fmt, moment, self.options.damping, clipping)
        except (PassError, CalibrationError) as error:
            raise type(error)(f"{describe(node)}: {error}") from error

    def _record(
        self,
        node: torch.fx.Node,
        original: torch.fx.Node,
        w: torch.fx.Node,
        role: Role | None,
        kind: RecordRole,
    ) -> None:
        if role is None:
            return
        _, nbytes, errors = self._stored[self._key(original, w, role)]
        value = w.meta["val"]
        self.records.append(
            TensorRecord(
                node=node.name,
                op=str(original.target),
                operand=str(w.target),
                role=kind,
                shape=tuple(value.shape),
                decided_by=self.options.name,
                format=str(parse(role.format)),
                scale_kind="weight",
                nbytes=nbytes,
                nbytes_high=value.numel() * value.element_size(),
                source=source_line(original),
                module=innermost_module(original),
                provenance=self._provenance(original, w, role),
                **errors,
            )
        )

    def _provenance(
        self, node: torch.fx.Node, w: torch.fx.Node, role: Role
    ) -> ScaleProvenance:
        """Of which numbers its scales are; of calibration, where that had a part in them."""
        statistic = statistic_of(parse(role.format), self.options.clipping or role.clipping)
        solved = solved_of(node) is not None
        assignment = assignment_of(node)
        x = assignment.argument(node, "activation") if assignment is not None else None
        seen = None
        if isinstance(x, torch.fx.Node) and (solved or role.rounding == "compensated"):
            seen = self.rewriter.program.statistics.get(x.name)
        if solved:
            statistic += ", codes solved for the outputs"
        elif role.rounding == "compensated":  # see ``compensation``: only blocks' scales come later
            statistic += (" as earlier columns' errors left it"
                          if parse(role.format).granularity.kind == "block"
                          else ", codes compensated for the outputs")
        return ScaleProvenance(
            by="solve-weights" if solved else self.options.name, statistic=statistic,
            batches=None if seen is None else seen.batches, value=str(w.target))


def quantized_matrix(
    matrix: torch.Tensor, role: Role, clipping: Literal["amax", "mse"] | None = None,
    generator: torch.Generator | None = None, chunk: int | None = None,
) -> ScaledTensor:  # fmt: skip
    """A weight [N, K] as ``role`` stores it, scales along K.

    clipping: in place of the role's. generator: of stochastic rounding. chunk: elements quantized
    at a time; with a generator, another one draws other numbers.
    """
    fmt = parse(role.format)
    searched = fmt.replace(rule="mse") if (clipping or role.clipping) == "mse" else fmt
    outer = _tensor_scale(matrix, fmt) if role.rounding == "nearest" else None
    is_whole = outer is None and not _has_independent_rows(fmt)
    pieces = [matrix] if is_whole else _rows(matrix, chunk or _CHUNK)
    scales = None if outer is None else [outer]
    found = (quantize(piece, searched, rounding=role.rounding, generator=generator,
                      scales=scales).parts for piece in pieces)
    parts = next(found) if len(pieces) == 1 else _joined(found, matrix.shape[0])
    # how a scale was found is not part of what is stored
    return ScaledTensor.from_parts(parts, fmt, matrix.shape, dtype=matrix.dtype)


def part_names(fmt: ScaledFormat) -> list[str]:
    """What is added to a weight's name for each part that the format stores."""
    names = ["data", "scale"]
    names += ["tensor_scale"] if fmt.two_level else []
    return names + (["zero_point"] if fmt.zero_point else [])


def _slim(statistics: Mapping[str, TensorStatistics]) -> dict[str, TensorStatistics]:
    """Without moments, figures per channel and rows: large, and nothing after this reads them."""
    return {name: dataclasses.replace(seen, second_moment=None, channels=None, reservoir=None)
            for name, seen in statistics.items()}


def _has_independent_rows(fmt: ScaledFormat) -> bool:
    """Rows share no scale."""
    return not fmt.two_level and fmt.granularity.kind in ("row", "block")


def _rows(matrix: torch.Tensor, chunk: int) -> Sequence[torch.Tensor]:
    """Chunks of rows: their temporaries are small and stay in cache."""
    return matrix.split(max(chunk // max(matrix.shape[1], 1), 1))


def _tensor_scale(matrix: torch.Tensor, fmt: ScaledFormat) -> torch.Tensor | None:
    """The scale that all blocks share: with it given, rows are independent, bit for bit. None where
    there is none, or it is not finite."""
    if not fmt.two_level or fmt.granularity.kind != "block" or matrix.dtype == torch.float64:
        return None
    pieces = _rows(matrix, _SMALL_CHUNK)
    amax = whole_amax(torch.stack([whole_amax(piece.abs()) for piece in pieces]))
    return tensor_scale_of(amax, fmt) if bool(amax.isfinite()) else None


def _joined(pieces: Iterable[Sequence[torch.Tensor]], rows: int) -> list[torch.Tensor]:
    """The parts of all ``rows``; each piece is dropped before the next one is made."""
    whole: list[torch.Tensor] = []
    start = 0
    for parts in pieces:
        whole = whole or [part.new_empty((rows, *part.shape[1:])) if part.ndim else part
                          for part in parts]
        for part, into in zip(parts, whole, strict=True):
            if not part.ndim:
                continue  # of the whole tensor
            into[start : start + part.shape[0]] = part
        start += parts[0].shape[0]
    return whole
