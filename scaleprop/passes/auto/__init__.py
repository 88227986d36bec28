"""Auto: try chains of methods, take the best for each region, and say what each would have given.

1. Each chain transforms the whole program; its operators' errors, and the model's, are measured on
   calibration data in the assigned formats.
2. Operators that some chain's transform ties form a region. Each region takes the chain with the
   least mean error of its operators; the mixture is measured as well.
3. Of the four best of them, weights are rounded with compensation (GPTQ, as ``solve-weights``).

The result is whichever program had the least error of the model's outputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from torch.utils import _pytree as pytree

from scaleprop.calibration.feed import Data, refuse_bare
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import (
    CalibrationError,
    ConfigError,
    PassError,
    PostconditionError,
    PreconditionError,
)
from scaleprop.passes.assign import assignment_of
from scaleprop.passes.auto.chains import class_error, parse_chain, run_chain, together
from scaleprop.passes.auto.emulation import Batches, Score, outputs_of, score
from scaleprop.passes.base import Pass, PassManager, PassResult, Program
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.solve_weights import SolveWeights
from scaleprop.passes.solving.walk import recorded
from scaleprop.report.records import TrialRecord

PORTFOLIO = ("", "smooth", "os-plus", "awq", "fold-norms+rotate", "smooth-rotate")
STATIC = "merge-quant"  # ends every chain where scales of activations are static
FINALISTS = 4  # get their weights solved: errors before say little of the order after
MIXED = "best of each region"
SOLVED = "solve-weights"


@dataclasses.dataclass(frozen=True)
class Auto(Pass):
    """Choose transforms by what they give on calibration data (``recipe="auto"``).

    chains: what is tried, methods joined by ``+``; "" is rounding alone. None: ``PORTFOLIO``, each
        with ``merge-quant`` at its end where activations have static scales.
    batches: how many batches of calibration data choices are measured on; weights are solved on
        all of them. solve: also try weights rounded with compensation.
    runtime: allow transforms that leave operators at run time.
    progress: show a bar on standard error (needs rich).
    """

    data: Data | None = None
    chains: tuple[str, ...] | None = None
    batches: int = 8
    solve: bool = True
    runtime: bool = True
    progress: bool = False

    name: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        """Raise ``ConfigError`` for an unknown method, or no chain or batch."""
        if self.chains == () or self.batches < 1:
            raise ConfigError("auto needs at least one chain and one batch to measure")
        for chain in self.chains or ():
            parse_chain(chain)

    def requires(self, program: Program) -> None:
        """Formats must have been assigned: errors are measured in them."""
        if not program.is_assigned:
            raise PreconditionError("no formats are assigned; run assign-formats first")

    def run(self, program: Program) -> PassResult:
        """The best program found; ``trials`` says what the others would have given."""
        if self.data is None:
            raise CalibrationError("auto measures errors on calibration data. Remedy: pass "
                                   "calibration= (example inputs, or a function that calls the "
                                   "model)")  # fmt: skip
        refuse_bare(self.data)
        everything = recorded(self.data, program)
        search = _Search(self, program, everything[: self.batches])
        chains = portfolio(program) if self.chains is None else self.chains
        with progress_bar(self.progress, len(chains) + 2, "choosing") as update:
            for count, chain in enumerate(chains):
                search.try_chain(chain)
                update(count + 1)
            search.try_mixture()
            update(len(chains) + 1)
            if self.solve:
                search.try_solved(self.data)
        best = search.best()
        notes = [f"{trial.chain or 'rounding alone'}: error {trial.error:.3g}"
                 for trial in search.trials]  # fmt: skip
        chosen = dataclasses.replace(best.trial, chosen=True)
        trials = tuple(chosen if trial is best.trial else trial for trial in search.trials)
        result = best.program.replace(trials=(*program.trials, *trials),
                                      statistics=program.statistics)  # fmt: skip
        notes += [*search.failed, f"chosen: {chosen.chain or 'rounding alone'}"]
        return PassResult(result, True, tuple(notes))


def portfolio(program: Program) -> tuple[str, ...]:
    """The chains to try where none are asked for."""
    found = map(assignment_of, program.module.graph.nodes)
    roles = [item.activation for item in found if item is not None]
    if not any(role is not None and role.scaling == "static" for role in roles):
        return PORTFOLIO
    return "", *(f"{chain}+{STATIC}".removeprefix("+") for chain in PORTFOLIO)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tried:
    program: Program
    score: Score
    trial: TrialRecord


class _Search:
    """What was tried so far."""

    def __init__(self, options: Auto, program: Program, batches: Batches) -> None:
        self.options = options
        self.program = program
        self.batches = batches
        self.expected = outputs_of(program, batches)
        self.operators = [node.name for node in program.module.graph.nodes
                          if assignment_of(node) is not None]  # fmt: skip
        self.tried: dict[str, _Tried] = {}
        self.failed: list[str] = []  # what could not be tried, and why

    @property
    def trials(self) -> list[TrialRecord]:
        return [tried.trial for tried in self.tried.values()]

    def try_chain(self, chain: str) -> None:
        """One chain for all operators. One that cannot take this program is noted."""
        began = time.perf_counter()
        try:
            program = run_chain(self.program, parse_chain(chain), self._data(),
                                runtime=self.options.runtime)  # fmt: skip
        except PostconditionError:
            raise  # a broken promise is no reason to try something else
        except PassError as error:
            self.failed.append(f"{chain} cannot take this program: {error}")
            return
        self._keep(chain, program, began, self.operators)

    def try_mixture(self) -> None:
        """Each region by the chain that serves it best."""
        began = time.perf_counter()
        regions = together([tried.program for tried in self.tried.values()], self.operators)
        chosen: dict[str, list[str]] = {}
        for names in regions:
            best = min(self.tried, key=lambda chain: class_error(
                self.tried[chain].score.local, names))
            chosen.setdefault(best, []).extend(names)
        if len(chosen) < 2:
            return
        program = self.program
        for chain, names in chosen.items():
            program = run_chain(program, parse_chain(chain), self._data(), names,
                                self.options.runtime)  # fmt: skip
        self._keep(MIXED, program, began, self.operators)
        for chain, names in chosen.items():
            tried = self.tried[chain]
            self.tried[chain] = dataclasses.replace(tried, trial=dataclasses.replace(
                tried.trial, operators=tuple(sorted(names))))  # fmt: skip

    def try_solved(self, data: Data) -> None:
        """Weights of the best programs, rounded with compensation."""
        for best in self._ranked()[:FINALISTS]:
            began = time.perf_counter()
            steps = PassManager([self._calibration(), SolveWeights(data=data)])
            try:
                program = steps.run(best.program)
            except PostconditionError:
                raise
            except PassError as error:
                self.failed.append(f"{SOLVED} cannot take this program: {error}")
                return
            chain = f"{best.trial.chain} + {SOLVED}".removeprefix(" + ")
            self._keep(chain, program, began, self.operators)

    def best(self) -> _Tried:
        """The least error of the model's outputs."""
        return self._ranked()[0]

    def _ranked(self) -> list[_Tried]:
        return sorted(self.tried.values(), key=lambda tried: tried.score.error)

    def _keep(self, chain: str, program: Program, began: float, operators: list[str]) -> None:
        calibrated = PassManager([self._calibration()]).run(program)
        found = score(calibrated, self.batches, self.expected)
        trial = TrialRecord(chain=chain, error=found.error,
                            local_error=class_error(found.local, operators),
                            seconds=time.perf_counter() - began)  # fmt: skip
        self.tried[chain] = _Tried(program, found, trial)

    def _calibration(self) -> Calibrate:
        return Calibrate(data=self._data())

    def _data(self) -> Any:
        """The measured batches, as a function that calls the model with each."""
        batches = self.batches
        spec = self.program.in_spec

        def call(model: Any) -> None:
            for args, kwargs in _inputs(batches, spec):
                model(*args, **kwargs)

        return call


def _inputs(batches: Batches, spec: Any) -> Iterator[tuple[Any, Any]]:
    for leaves in batches:
        yield pytree.tree_unflatten(list(leaves), spec)
