"""Calibrate: run example inputs through the graph and keep what static scales and compensated
weights need.

Memory is constant in the number of batches: only statistics are kept, and activations die as soon
as the graph has read them. An interruption (Ctrl-C) leaves the given program as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.fx
from torch.utils import _pytree as pytree

from scaleprop.calibration.observer import Observer
from scaleprop.calibration.progress import progress_bar
from scaleprop.errors import CalibrationError
from scaleprop.passes.assign import assignment_of
from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.dimensions import is_symbolic
from scaleprop.rules import contraction_of


@dataclasses.dataclass(frozen=True)
class Calibrate(Pass):
    """Collect statistics of activations from example inputs.

    data: an iterable of inputs (a tensor; a tuple of arguments; a dict of keyword arguments), or
        a function ``f(model)`` that calls the model that it is given.
    everything: also watch the activations of contractions that need no static scale.
    progress: show a bar on standard error (needs rich).
    moments: also keep second moments of what the weights of linear operators are multiplied with,
        [K, K] each; None: for those weights whose role has ``rounding="compensated"``.
    """

    data: Iterable[Any] | Callable[[Any], Any] | None = None
    everything: bool = False
    progress: bool = False
    moments: bool | None = None

    name: ClassVar[str] = "calibrate"
    preserves_function: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The same graph, with ``statistics``."""
        if self.data is None:
            raise CalibrationError(
                "no calibration data. Remedy: pass an iterable of example inputs, or a function "
                "that calls the model"
            )
        refuse_bare(self.data)
        moments = moment_nodes(program, self.moments)
        watched = watched_nodes(program, self.everything) | moments
        if not watched:
            note = "nothing to calibrate: no scale is static, no weight is compensated"
            return PassResult(program, False, (note,))
        total = _length(self.data)
        with progress_bar(self.progress, total) as update:
            observer = Observer(program.module, watched, update, moments)
            model = _Observed(program, observer)
            feed(self.data, model)
        refuse_empty(observer.batch)
        statistics = {**program.statistics, **observer.summary()}
        note = f"{len(observer.statistics)} values over {observer.batch} batches"
        return PassResult(program.replace(statistics=statistics), True, (note,))


def feed(data: Iterable[Any] | Callable[[Any], Any], model: Callable[..., Any]) -> None:
    """Call ``model`` on every element of ``data``, or let ``data`` call it.

    Raises:
        CalibrationError: where ``data`` is a single batch.
    """
    refuse_bare(data)
    if callable(data):
        data(model)
        return
    for batch in data:
        args, kwargs = _as_call(batch)
        model(*args, **kwargs)


def refuse_bare(data: Any) -> None:
    """Raise ``CalibrationError`` for one batch, whose rows or names would be taken for batches."""
    if isinstance(data, (torch.Tensor, Mapping)):
        raise CalibrationError(
            f"calibration data is an iterable of batches, not one {type(data).__name__}. "
            f"Remedy: wrap it in a list"
        )


def refuse_empty(batches: int) -> None:
    """Raise ``CalibrationError`` where the model was never called."""
    if batches == 0:
        raise CalibrationError(
            "calibration data was empty: the model was never called. Remedy: pass at least "
            "one batch; a generator can be read only once"
        )


def watched_nodes(program: Program, everything: bool = False) -> set[str]:
    """Names of the values whose statistics are needed."""
    found: set[str] = set()
    for node in program.module.graph.nodes:
        assignment = assignment_of(node)
        needs = everything or (
            assignment is not None
            and assignment.activation is not None
            and assignment.activation.scaling == "static"
        )
        contraction = contraction_of(node)
        if not needs or contraction is None:
            continue
        for operand in contraction.operands:
            source = node.args[operand.argument] if operand.argument < len(node.args) else None
            if operand.role == "activation" and isinstance(source, torch.fx.Node):
                found.add(source.name)
    return found


def moment_nodes(program: Program, wanted: bool | None = None) -> set[str]:
    """Names of the values whose second moments compensated weights need.

    wanted: for all linear weights that get a format, or none; None: as their roles say.
    """
    found: set[str] = set()
    for node in program.module.graph.nodes:
        assignment = assignment_of(node)
        if assignment is None or assignment.contraction.kind != "linear":
            continue
        weight, source = assignment.weight, assignment.argument(node, "activation")
        compensates = weight is not None and weight.rounding == "compensated"
        needs = compensates if wanted is None else wanted and weight is not None
        if needs and isinstance(source, torch.fx.Node):
            found.add(source.name)
    return found


class _Observed(torch.nn.Module):
    """What a calibration function calls: the model's signature, observed."""

    def __init__(self, program: Program, observer: Observer) -> None:
        super().__init__()
        self._program = program
        self._observer = observer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for these inputs, while its values are observed."""
        leaves = self._leaves(args, kwargs)
        outputs = self._observer.observe(leaves)
        return pytree.tree_unflatten(outputs, self._program.out_spec)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Flat inputs in graph order; names decide, as in a call of the model itself."""
        given = {**dict(zip(self._names(), args, strict=False)), **kwargs}
        expected_args, expected_kwargs = self._expected()
        names = [*expected_args, *expected_kwargs]
        if len(args) > len(self._names()) or set(given) != set(names):
            raise CalibrationError(self._mismatch(given))
        ordered = (
            tuple(given[name] for name in expected_args),
            {name: given[name] for name in expected_kwargs},
        )
        leaves, spec = pytree.tree_flatten(ordered)
        if spec != self._program.in_spec:
            raise CalibrationError(self._mismatch(given))
        for node, leaf in zip(self._program.placeholders, leaves, strict=True):
            self._check(node, leaf)
        return leaves

    def _check(self, node: torch.fx.Node, leaf: Any) -> None:
        want = node.meta.get("val")
        if not isinstance(want, torch.Tensor):
            return
        fits = (
            isinstance(leaf, torch.Tensor)
            and leaf.dtype == want.dtype
            and leaf.ndim == want.ndim
            and all(
                is_symbolic(size) or size == got
                for size, got in zip(want.shape, leaf.shape, strict=True)
            )
        )
        if not fits:
            raise CalibrationError(
                f"calibration batch {self._observer.batch}: input {node.name!r} should be "
                f"{want.dtype} {[str(size) for size in want.shape]}, but is {_spell(leaf)}"
            )

    def _expected(self) -> tuple[list[str], list[str]]:
        """Names of the positional inputs, and of the keyword ones."""
        _, kwargs_spec = self._program.in_spec.children()
        return self._names()[: len(self._program.example_args)], list(kwargs_spec.context)

    def _names(self) -> list[str]:
        code = self._program.module.graph._codegen  # pyright: ignore[reportPrivateUsage]
        info: Any = getattr(code, "pytree_info", None)
        return list(info.orig_args) if info else [n.name for n in self._program.placeholders]

    def _mismatch(self, given: Mapping[str, Any]) -> str:
        expected_args, expected_kwargs = self._expected()
        return (
            f"calibration batch {self._observer.batch} does not fit the model: expected inputs "
            f"{[*expected_args, *expected_kwargs]} with structure {self._program.in_spec}, but "
            f"got {dict((name, _spell(value)) for name, value in given.items())}"
        )


def _as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of one element of the data."""
    if isinstance(batch, Mapping):
        return (), {str(name): value for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and (
            isinstance(batch[1], dict)
        ):
            return tuple(batch[0]), batch[1]
        return tuple(batch), {}
    return (batch,), {}


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


def _spell(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__}"
