"""Solve weights layer by layer: GPTQ and RSQ, each on what the quantized layers before it make.

Rounding the weights W [N, K] of a linear operator to Ŵ costs its output

    tr((W - Ŵ) H (W - Ŵ)ᵀ),    H = Σ_t r_t x_t x_tᵀ

over the tokens x_t of the calibration data. ``compensation`` finds Ŵ column by column (E. Frantar
et al., GPTQ, arXiv:2210.17323). The graph is walked once, all batches at a time. Where the first of
the operators that read one value in one role is reached, H of that value is gathered, their weights
are solved and H is dropped: one H is alive, and of the batches what the rest of the graph still
reads. With ``sequential``, what was solved takes effect at once, so x_t has the errors of all
layers before, as it will have at run time.

With r_t = 1 this is GPTQ. RSQ weighs tokens by how much attention they receive (Y.-L. Sung et al.,
Rotate, Scale, then Quantize, arXiv:2503.01820); see ``solving.tokens`` for the weights and
``solving.attention`` for whose attention it is. Rotations are passes of their own.

A weight with several readers is solved at the last of them, from the sum of their H; until then it
runs unquantized.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.fx

from scaleprop.calibration.feed import Data, refuse_bare
from scaleprop.calibration.moments import SecondMoment
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import (
    CalibrationError,
    ConfigError,
    PassError,
    PostconditionError,
    PreconditionError,
    describe,
)
from scaleprop.formats import ScaledTensor, fake_quantize, parse, quantize
from scaleprop.passes.assign import Assignment, assignment_of
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.compensation import DAMPING, Curvature, check_format, compensated_by
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.solving.attention import Attention, Attentions
from scaleprop.passes.solving.solved import SOLVED, solved_of
from scaleprop.passes.solving.store import Store, fingerprint
from scaleprop.passes.solving.tokens import Strategy, first_scores, norm_scores, scaled_scores
from scaleprop.passes.solving.walk import Walk, recorded
from scaleprop.recipes.base import Role

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SolveWeights(Pass):
    """Round the weights of linear operators for least output error, one layer at a time.

    data: calibration data, as ``Calibrate`` takes it; inputs without padding.
    sequential: layers see what the quantized layers before them make; else the unquantized ones.
    activations: with ``sequential``, activations are quantized too where formats are assigned.
    act_order: round columns by descending diagonal of H; scales of blocks are found beforehand.
    static_groups: find scales of blocks beforehand; 2-D tiles need it, or ``act_order``.
    damping: added to the diagonal of H, in units of its mean.
    clipping: ``amax`` or ``mse`` for all weights; None: as the recipe says.
    strategy: how tokens are weighted: ``uniform``, ``attention``, ``norm`` or ``first-n``.
    r_min, r_max: the smallest and largest weight of a token in its sequence, before division by
        their mean.
    first: of ``first-n``, how many tokens of a sequence get r_max.
    resume: a directory for what is solved; what an interrupted run left there is used again.
    progress: show a bar on standard error (needs rich).
    """

    data: Data | None = None
    sequential: bool = True
    activations: bool = True
    act_order: bool = False
    static_groups: bool = False
    damping: float = DAMPING
    clipping: Literal["amax", "mse"] | None = None
    strategy: Strategy = "uniform"
    r_min: float = 0.005
    r_max: float = 1.0
    first: int | None = None
    resume: str | None = None
    progress: bool = False

    name: ClassVar[str] = "solve-weights"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an option that makes no sense."""
        for option in ("damping", "r_min", "r_max"):
            value: Any = getattr(self, option)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 <= value < math.inf:
                raise ConfigError(f"{option}={value!r} must be a number, at least 0")
        if not self.r_min <= self.r_max or self.r_max == 0:
            raise ConfigError(f"r_min={self.r_min}, r_max={self.r_max}: r_max must be positive, "
                              "and r_min at most r_max")
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"strategy={self.strategy!r}; known: {get_args(Strategy)}")
        first: Any = self.first
        if (self.strategy == "first-n") != (first is not None) or (
            first is not None and (type(first) is not int or first < 1)
        ):
            raise ConfigError(f"first={first!r} with strategy={self.strategy!r}: 'first-n', and "
                              "it alone, takes first=, a number of tokens from 1")
        if self.resume is not None and not isinstance(self.resume, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"resume={self.resume!r} is no directory's path")

    def requires(self, program: Program) -> None:
        """Formats must have been assigned, and weights not stored yet."""
        if not program.is_assigned:
            raise PreconditionError("no formats are assigned; run assign-formats first")

    def run(self, program: Program) -> PassResult:
        """The same graph; solved weights wait in ``node.meta`` for ``quantize-weights``."""
        if self.data is None:
            raise CalibrationError(
                "no calibration data. Remedy: pass an iterable of example inputs, or a function "
                "that calls the model"
            )
        refuse_bare(self.data)
        rewriter = Rewriter(program, self.name)
        work = _Solver(rewriter, self)
        if not work.groups:
            note = "nothing to solve: no weight of a linear operator has a format"
            return PassResult(rewriter.program, False, (note,))
        total = sum(len(group.members) for group in work.groups)
        with progress_bar(self.progress, total, "solving weights") as update:
            work.run(Walk(rewriter.module, recorded(self.data, rewriter.program)), update)
        return PassResult(rewriter.program, True, work.notes())

    def ensures(self, program: Program) -> None:
        """Every assigned weight of a linear operator is solved."""
        for node in program.module.graph.nodes:
            if _role(node) is not None and solved_of(node) is None:
                raise PostconditionError(f"{describe(node)} has a weight that was not solved")


@dataclasses.dataclass(frozen=True)
class _Group:
    """The linear operators that read ``source`` in one role, in graph order."""

    source: torch.fx.Node
    activation: Role | None
    members: tuple[tuple[torch.fx.Node, Role], ...]


def _role(node: torch.fx.Node) -> Role | None:
    """The role of a linear operator's weight."""
    assignment = assignment_of(node)
    is_linear = assignment is not None and assignment.contraction.kind == "linear"
    return assignment.weight if assignment is not None and is_linear else None


def _groups(graph: torch.fx.Graph) -> list[_Group]:
    found: dict[tuple[torch.fx.Node, Role | None], list[tuple[torch.fx.Node, Role]]] = {}
    for node in graph.nodes:
        assignment, role = assignment_of(node), _role(node)
        if assignment is not None and role is not None:
            key = (assignment.argument(node, "activation"), assignment.activation)
            found.setdefault(key, []).append((node, role))
    return [_Group(source, activation, tuple(members))
            for (source, activation), members in found.items()]  # fmt: skip


class _Solver:
    """The pass at work."""

    def __init__(self, rewriter: Rewriter, options: SolveWeights) -> None:
        self.groups = _groups(rewriter.graph)
        self._rewriter = rewriter
        self._options = options
        self._store = None if options.resume is None else Store(options.resume)
        self._done = 0
        self._readers: dict[Any, list[torch.fx.Node]] = {}
        for group in self.groups:
            for node, role in group.members:
                self._check(node, role)
                self._readers.setdefault(self._key(node, role), []).append(node)
        self._left = Counter({key: len(nodes) for key, nodes in self._readers.items()})
        self._sums: dict[Any, torch.Tensor] = {}
        self._attentions: dict[torch.fx.Node, Attention] = {}
        self._unweighted: dict[torch.fx.Node, str] = {}
        if options.strategy == "attention":
            self._find_attentions()
        self._scores: dict[Any, list[torch.Tensor]] = {}

    def run(self, walk: Walk, update: Callable[[int], None]) -> None:
        """Walk to the last group; what is behind it does not run."""
        starts = {group.members[0][0]: group for group in self.groups}
        wanted: dict[torch.fx.Node, set[torch.fx.Node]] = {}
        for source, attention in self._attentions.items():
            wanted.setdefault(attention.node, set()).add(source)
        for node in self._rewriter.graph.nodes:
            for source in wanted.get(node, ()):
                self._score(walk, source)  # what it is found from may die here
            group = starts.pop(node, None)
            if group is not None:
                self._solve(walk, group)
                update(self._done)
                if not starts:
                    return
            walk.run(node, self._replaced(node))

    def notes(self) -> tuple[str, ...]:
        """What a reader should know."""
        found = [f"{len(self._readers)} weights solved in {len(self.groups)} groups"]
        if self._store is not None:
            found.append(f"{self._store.loaded} of them as an earlier run left them in "
                         f"{self._options.resume!r}")
            if self._store.stale:
                found.append(f"{self._store.stale} files there were made from other weights, data "
                             "or options: solved again and replaced")
        reasons: dict[str, list[str]] = {}
        for source, reason in self._unweighted.items():
            reasons.setdefault(reason, []).append(source.name)
        found += [f"tokens of {', '.join(names)} weighted uniformly: {reason}"
                  for reason, names in reasons.items()]  # fmt: skip
        return tuple(found)

    # ------------------------------------------------------------------ solving

    def _solve(self, walk: Walk, group: _Group) -> None:
        """Solve the weights of ``group`` that no later reader waits for."""
        moment = self._moment(walk, group)
        factored: dict[torch.device, Curvature] = {}
        for node, role in group.members:
            key = self._key(node, role)
            self._left[key] -= 1
            if len(self._readers[key]) == 1:
                solved = self._solved(node, role, moment, factored)
            else:
                earlier = self._sums.pop(key, None)
                self._sums[key] = moment if earlier is None else earlier + moment
                if self._left[key]:
                    continue
                solved = self._solved(node, role, self._sums.pop(key), {})
            for reader in self._readers[key]:
                reader.meta[SOLVED] = solved
            self._done += len(self._readers[key])

    def _solved(
        self, node: torch.fx.Node, role: Role, moment: torch.Tensor,
        factored: dict[torch.device, Curvature],
    ) -> ScaledTensor:
        """One weight: as an earlier run left it, or solved now. ``factored``: H's factors."""
        options, fmt = self._options, parse(role.format)
        matrix, name = self._matrix(node), self._name(node, role)
        clipping = options.clipping or role.clipping
        mark = ""
        if self._store is not None:
            said = f"{options.damping!r};{clipping};{options.act_order};{options.static_groups}"
            mark = fingerprint(matrix, fmt, said, moment)
            if (found := self._store.load(name, mark, matrix, fmt)) is not None:
                return found
        try:
            if matrix.device not in factored:
                factored[matrix.device] = Curvature.of(
                    moment.to(matrix.device), matrix.shape[1], options.damping, options.act_order)
            solved = compensated_by(matrix, fmt, factored[matrix.device], clipping,
                                    options.static_groups)
        except (PassError, CalibrationError) as error:
            raise type(error)(f"{describe(node)}: {error}") from error
        if self._store is not None:
            self._store.save(name, mark, solved)
        logger.debug("%s solved", name)
        return solved

    def _moment(self, walk: Walk, group: _Group) -> torch.Tensor:
        """H of what ``group`` reads, over all batches."""
        quantizer = self._quantizer(group.members[0][0], group.source, group.activation)
        total: SecondMoment | None = None
        for batch in range(len(walk)):
            value = walk.value(batch, group.source)
            weights = self._weights(walk, group.source, batch, value)
            rows = value if quantizer is None else quantizer(value)
            if weights is not None:
                rows = rows.float() * weights.sqrt().float().unsqueeze(-1)
            total = total or SecondMoment(value.shape[-1])
            total.add(rows)
        assert total is not None  # data is not empty
        return total.total()

    # ------------------------------------------------------------------ weights of tokens

    def _find_attentions(self) -> None:
        attentions = Attentions(self._rewriter.graph)
        for source in dict.fromkeys(group.source for group in self.groups):
            found = attentions.of(source)
            if isinstance(found, Attention):
                self._attentions[source] = found
            else:
                self._unweighted[source] = found

    def _weights(
        self, walk: Walk, source: torch.fx.Node, batch: int, value: torch.Tensor
    ) -> torch.Tensor | None:
        """r of every row of ``value`` [..., T, K]; None: 1."""
        options = self._options
        if options.strategy == "uniform" or value.dim() < 2 or source in self._unweighted:
            return None
        if options.strategy == "attention":
            self._score(walk, source)
            scores = self._scores[self._score_key(source)][batch]
        elif options.strategy == "norm":
            scores = norm_scores(value)
        else:
            scores = first_scores(value, options.first or 0)
        return scaled_scores(scores, options.r_min, options.r_max)

    def _score_key(self, source: torch.fx.Node) -> Any:
        return self._attentions[source].node, source.meta["val"].dim() - 1

    def _score(self, walk: Walk, source: torch.fx.Node) -> None:
        """Attention's concentration in every batch, found once: before its layer is solved."""
        attention, key = self._attentions[source], self._score_key(source)
        if key not in self._scores:
            self._scores[key] = [
                attention.concentration(walk.ahead(batch, attention.reads), key[1])
                for batch in range(len(walk))
            ]

    # ------------------------------------------------------------------ the quantized prefix

    def _replaced(self, node: torch.fx.Node) -> dict[int, Callable[[Any], Any]]:
        """What ``node`` reads in place of its weight and its activation."""
        assignment = assignment_of(node)
        if assignment is None or not self._options.sequential:
            return {}
        found: dict[int, Callable[[Any], Any]] = {}
        for operand in assignment.contraction.operands:
            if operand.role == "weight" and assignment.weight is not None:
                weight = self._quantized(node, assignment, assignment.weight)
                found[operand.argument] = lambda given, w=weight: given if w is None else w
            elif operand.role == "activation":
                source: Any = assignment.argument(node, "activation")
                quantizer = self._quantizer(node, source, assignment.activation)
                if quantizer is not None:
                    found[operand.argument] = quantizer
        return found

    def _quantized(
        self, node: torch.fx.Node, assignment: Assignment, role: Role
    ) -> torch.Tensor | None:
        """The weight that ``node`` will have; None while a shared one waits for its last reader."""
        shape = assignment.argument(node, "weight").meta["val"].shape
        if assignment.contraction.kind == "linear":
            solved = solved_of(node)
        else:
            fmt = parse(role.format)
            searched = fmt.replace(rule="mse") if role.clipping == "mse" else fmt
            solved = quantize(self._matrix(node), searched)
        return None if solved is None else solved.dequantize().reshape(shape)

    def _quantizer(
        self, node: torch.fx.Node, source: torch.fx.Node, role: Role | None
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """How ``node`` reads its activation ``source``; None: as it is."""
        options = self._options
        if role is None or not (options.sequential and options.activations):
            return None
        scales: list[torch.Tensor] | None = None
        if role.scaling == "static":
            seen = self._rewriter.program.statistics.get(source.name)
            assignment = assignment_of(node)
            given = None if assignment is None else assignment.extremes
            if given is None and seen is not None:
                given = seen.min, seen.max
            if given is None:
                raise CalibrationError(
                    f"{describe(node)}: the scale of its input {source.name!r} is static and was "
                    "not calibrated. Remedy: run calibrate before solve-weights, or give "
                    "activations=false"
                )
            scales = quantize(torch.tensor(given, dtype=torch.float32), role.format).parts[1:]
        return lambda value: fake_quantize(value, role.format, scales=scales)

    # ------------------------------------------------------------------ weights by name

    def _check(self, node: torch.fx.Node, role: Role) -> None:
        try:
            check_format(parse(role.format), self._options.static_groups or self._options.act_order)
        except PassError as error:
            raise PassError(f"{describe(node)}: {error}") from error

    def _tensor(self, node: torch.fx.Node) -> torch.Tensor:
        assignment = assignment_of(node)
        weight = None if assignment is None else assignment.argument(node, "weight")
        tensor = self._rewriter.tensor(weight)
        if tensor is None:
            raise PreconditionError(f"{describe(node)}: its weight is no parameter any more")
        return tensor

    def _matrix(self, node: torch.fx.Node) -> torch.Tensor:
        tensor = self._tensor(node)
        return tensor.detach().reshape(tensor.shape[0], -1)

    def _name(self, node: torch.fx.Node, role: Role) -> str:
        assignment = assignment_of(node)
        assert assignment is not None
        return f"{assignment.argument(node, 'weight').target} {parse(role.format).long_name}"

    def _key(self, node: torch.fx.Node, role: Role) -> Any:
        """Equal for readers of one weight in one format."""
        tensor = self._tensor(node)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        return place, role.format, self._options.clipping or role.clipping
