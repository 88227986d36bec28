"""Training in low precision without touching the model's code."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.weak import WeakIdKeyDictionary

from scaleprop import _torch_compat as compat
from scaleprop.backends.dynamo import (
    Exponents,
    Options,
    Report,
    compile_with,
    reports_of,
    state_of,
)
from scaleprop.backends.graphs import Inner
from scaleprop.backends.state import TrainingState
from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.ops import estimators
from scaleprop.passes.training import Lowered
from scaleprop.passes.training.operands import Operands
from scaleprop.passes.training.rewrite import Quantized
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

if TYPE_CHECKING:
    from scaleprop.report.graph import Block

logger = logging.getLogger(__name__)


class ScaleReports(tuple[Report, ...]):
    """What was done to each graph of a prepared model.

    unread: matrices among its parameters that none of these graphs read when it was first called:
    what torch.compile could not take ran as it is, in high precision.
    """

    unread: tuple[str, ...] = ()

    def show(self) -> None:
        """Print a table of every value that was cast, and why products stayed high.

        Raises:
            BackendUnavailable: without rich.
        """
        from scaleprop.report.console import stdout_console

        console = stdout_console()
        for place, graph in enumerate(self):
            title, names, rows = _quantized_rows(graph) if isinstance(graph, Operands) \
                else _cast_rows(graph)
            console.print(_table(f"graph {place}: {title}", names, rows, graph.high))
        if self.unread:
            console.print(f"not compiled, as it was: {', '.join(self.unread)}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path``: ``.html`` (one offline page) or ``.json`` (schema: version 1 in
        ``scaleprop.analysis.prepared``): every value that was cast, and why products stayed high.

        Raises:
            ConfigError: on another suffix, or where the path cannot be written.
        """
        from scaleprop.analysis.prepared import render, to_dict
        from scaleprop.report.files import write_report

        write_report(path, lambda: render(self), lambda: to_dict(self))

    def graph_view(
        self, block: str | None = None, depth: int | None = None, graph: int = 0
    ) -> Block:
        """A picture of one block of a graph, by its number: what products read, forward and
        backward; ``block`` and ``depth`` as for ``CompiledModel.graph_view``.

        Raises:
            ConfigError: where there is no such graph or block; or every value was truncated.
        """
        from scaleprop.analysis.training_view import prepared_block

        if not 0 <= graph < len(self):
            raise ConfigError(f"graph={graph}: {len(self)} graphs were compiled so far. Remedy: "
                              "call the model once, and choose one of them")
        return prepared_block(self[graph], block, depth)


def _table(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], high: Mapping[str, str]
) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    for node, why in high.items():
        table.add_row(node, "product", "high", *[""] * (len(names) - 4), why)
    return table


def _cast_rows(graph: Lowered) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    rows = [(cast.value, cast.kind, cast.element,
             "?" if cast.amax is None else f"{cast.amax:.3g}", f"2^{cast.drift:.1f}",
             "at run time" if cast.exponent is None else f"2^{cast.exponent}", cast.why)
            for cast in graph.casts]
    return (f"{len(graph.products)} products in low precision",
            ("value", "is", "element", "amax", "drift", "exponent", "why"), rows)


def _quantized_rows(graph: Operands) -> tuple[str, Sequence[str], Sequence[Sequence[str]]]:
    rows = [(each.value, each.role, each.operand.format, each.operand.rounding,
             f"{each.operand.hadamard} {each.operand.signs}" if each.operand.hadamard else "",
             each.operand.scaling, f"{each.layer}: {each.why}" if each.why else each.layer)
            for each in graph.quantized]
    done = f"{graph.truncated} values truncated" if graph.truncated else \
        f"{len(rows)} operands in low precision"
    return (done, ("value", "role", "format", "rounding", "rotation", "scaling", "layer, or why"),
            rows)


@dataclasses.dataclass
class _Prepared:
    """What is known of a prepared model.

    measured: the largest magnitudes of its parameters when exponents were fixed by them, name →
    (least, greatest) of all graphs. read: parameters that graphs read. unread: names of those that
    none did in the first call; None before it.
    """

    options: Options
    dynamic: bool | None
    fullgraph: bool
    state: TrainingState
    reports: list[Report] = dataclasses.field(default_factory=list[Report])
    measured: dict[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict[str, tuple[float, float]])
    read: Any = dataclasses.field(default_factory=WeakIdKeyDictionary)
    unread: tuple[str, ...] | None = None


_PREPARED: WeakKeyDictionary[torch.nn.Module, _Prepared] = WeakKeyDictionary()
_MOVED = 2.0  # a parameter's size, by a checkpoint: exponents leave room for more, layers add up


def prepare_training(
    model: torch.nn.Module, recipe: str | TrainingRecipe = "fp8", *, inner: Inner = "inductor",
    exponents: Exponents = "measured", seed: int = 0, dynamic: bool | None = None,
    fullgraph: bool = False,
) -> torch.nn.Module:
    """Let ``model`` run forward and backward by ``recipe``, from its next call on.

    The model itself is returned: its parameters, ``state_dict`` keys, hooks and optimizers stay
    what they were, as after ``nn.Module.compile``. Call it again to change the recipe. Where
    training is distributed, ``held`` and ``delayed`` scales are of all ranks' data, ``current``
    ones each rank's own, as TransformerEngine has it.
    ``model.scale_report()`` says what was done. Where ``load_state_dict`` brings weights of another
    size than exponents were fixed for, these are found anew.

    Args:
        recipe: ``fp8`` runs linear layers on E4M3 data and gradients in E5M2; ``mxfp8``, ``nvfp4``
            and others name what ``scaleprop.recipes.training_named`` lists; or one of your own.
        inner: what runs the rewritten graphs: ``inductor``, or ``eager``, to debug.
        exponents: what those of ``fp8`` are chosen by: one batch ``measured``, or ``predicted``;
            see ``scaleprop.backends.dynamo.Options``.
        seed: of stochastic rounding and random signs; ``training_state`` says how far they are.
            Numbers depend on parameters' names: blocks prepared one by one have the same unless
            each has a seed of its own.
        dynamic, fullgraph: as for ``torch.compile``.

    Raises:
        ConfigError: on an unknown recipe or inner compiler, or a model that Dynamo cannot trace.
    """
    options = Options(recipe=recipe, inner=inner, exponents=exponents, seed=seed)
    _check(model)
    before = _PREPARED.get(model)
    if before is None:
        model.register_load_state_dict_post_hook(_measure_again)
    # a recipe that follows another goes on counting steps
    state = before.state if before and before.state.seed == seed else \
        TrainingState(seed, model)
    _PREPARED[model] = _Prepared(options, dynamic, fullgraph, state)
    _start(model)
    # no parameter and no module, so not in state_dict; a copy's own says that it is not prepared
    report: Any = functools.partial(scale_report, model)
    model.scale_report = report
    return model


def _check(model: Any) -> None:
    """Raise ``ConfigError`` for what would run as it is, or not at all."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"prepare_training takes a torch.nn.Module, not {type(model).__name__}. "
                          'Remedy: torch.compile(function, backend="scaleprop") for functions.')
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"{type(model).__name__} is TorchScript, which runs past torch.compile. "
                          "Remedy: prepare the module that was scripted.")


def _start(model: torch.nn.Module) -> None:
    """Compile ``model`` at its next call."""
    prepared = _PREPARED[model]
    prepared.measured.clear()
    prepared.reports.clear()
    known = weakref.ref(model)
    compat.compile_in_place(model, functools.partial(_compile, model=known),
                            dynamic=prepared.dynamic, fullgraph=prepared.fullgraph,
                            after=functools.partial(_look_back, known))


def _compile(
    module: torch.fx.GraphModule, inputs: Sequence[Any], *,
    model: weakref.ref[torch.nn.Module],
) -> Any:
    named = model()
    assert named is not None  # it is being called
    prepared = _PREPARED[named]
    if prepared.options.recipe == "fp8":
        for name, size in _sizes(named).items():
            least, most = prepared.measured.get(name, (size, size))
            prepared.measured[name] = min(least, size), max(most, size)
    run = compile_with(module, inputs, prepared.options, prepared.state, prepared.reports.append)
    first = next((place for place, value in enumerate(inputs)
                  if isinstance(value, torch.nn.Parameter)), None)
    if first is None:
        return run

    def reading(*given: Any) -> Any:
        if given[first] not in prepared.read:  # blocks of a class may share the graph
            prepared.read.update((each, None) for each in given
                                 if isinstance(each, torch.nn.Parameter))
        return run(*given)

    return reading


def _look_back(known: weakref.ref[torch.nn.Module]) -> None:
    """Called after each call of a prepared model: says once what no graph was made of."""
    model = known()
    prepared = _PREPARED.get(model) if model is not None else None
    if model is None or prepared is None or prepared.unread is not None:
        return
    names = {id(each): name for name, each in model.named_parameters() if each.ndim > 1}
    read = {id(each) for each in prepared.read}
    recipe = training_recipe(prepared.options.recipe)
    quiet = not (recipe.operands or recipe.phases or recipe.every)
    if quiet or any(each.ndim > 1 and id(each) not in names for each in prepared.read):
        names = {}  # FSDP's parameters are others
    prepared.unread = tuple(name for place, name in names.items() if place not in read)
    if prepared.unread:
        logger.warning(
            "%s ran in high precision where torch.compile could not take it: no graph reads %s. "
            "Remedy: prepare_training(…, fullgraph=True) says what breaks graphs",
            type(model).__name__, ", ".join(prepared.unread))



def _sizes(model: torch.nn.Module) -> dict[str, float]:
    """The largest magnitude of each parameter whose numbers are here, whole, and not all zero."""
    with torch.no_grad(), compat.without_modes():
        found = {name: float(value.abs().max()) for name, value in model.named_parameters()
                 if type(value) is torch.nn.Parameter and value.is_floating_point()
                 and value.layout is torch.strided and not value.is_meta and value.numel()}
    return {name: size for name, size in found.items() if 0.0 < size < math.inf}


def _measure_again(model: torch.nn.Module, _: object) -> None:
    """Called after ``load_state_dict``: exponents that were fixed for much smaller or larger
    weights are found anew."""
    prepared = _PREPARED.get(model)
    if prepared is None or not prepared.measured:  # a copy, or nothing was measured yet
        return
    for name, size in _sizes(model).items():
        least, most = prepared.measured.get(name, (size, size))
        if not most / _MOVED <= size <= least * _MOVED:
            logger.info("%s was loaded with %.3g as its largest magnitude, where exponents were "
                        "fixed for %.3g: the model is measured again", name, size, most)
            _start(model)
            return


def scale_report(model: torch.nn.Module) -> ScaleReports:
    """What was done so far to each graph of a prepared model, or of one that was given to
    ``torch.compile(backend="scaleprop")``: products, casts and their exponents.

    Raises:
        ConfigError: where nothing is known of ``model``.
    """
    if model in _PREPARED:
        made = ScaleReports(_PREPARED[model].reports)
        made.unread = _PREPARED[model].unread or ()
        return made
    if found := reports_of(model):
        return ScaleReports(found)
    raise ConfigError(f"{type(model).__name__} was not given to scaleprop.prepare_training, nor "
                      'called since torch.compile(backend="scaleprop")')


def training_options(model: torch.nn.Module) -> tuple[Options, bool | None]:
    """What ``model`` was prepared with; and ``dynamic``.

    Raises:
        ConfigError: where it was not given to ``prepare_training``.
    """
    if model not in _PREPARED:
        raise ConfigError(f"{type(model).__name__} was not given to scaleprop.prepare_training")
    return _PREPARED[model].options, _PREPARED[model].dynamic


def training_state(model: torch.nn.Module) -> TrainingState:
    """What ``model``'s training remembers from step to step: how many there were, which random
    numbers go on from, and held and delayed scales. To be saved beside model and optimizer.

    Raises:
        ConfigError: where nothing is known of ``model``.
    """
    found = _PREPARED[model].state if model in _PREPARED else state_of(model)
    if found is None:
        raise ConfigError(f"{type(model).__name__} was not given to scaleprop.prepare_training, "
                          'nor called since torch.compile(backend="scaleprop")')
    return found


def deployable(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a prepared model, ordinary and in evaluation mode, whose weights are what its
    forward products multiply: values of the recipe's formats, in the parameters' dtype.

    A compiler that quantizes them to the same formats, as ``scaleprop.compile`` with a recipe of
    these does, finds the same codes. Activations are the recipe's no more.

    Raises:
        ConfigError: where ``model`` was not called yet, or its weights are rotated, stochastic, or
            scaled by more than their own data, as by ``fp8``; or all values are truncated.
    """
    reports = scale_report(model)
    if not reports:
        raise ConfigError(f"{type(model).__name__} was not called since it was prepared: nothing "
                          "is known of its layers")
    if any(isinstance(report, Lowered) or report.truncated for report in reports):
        raise ConfigError(f"{type(model).__name__} multiplies what its whole graph has scaled or "
                          "truncated, not what weights alone are quantized to. Remedy: a recipe "
                          "with scales of the data, as fp8-current")
    made = copy.deepcopy(model).eval()
    made.__dict__.pop("scale_report", None)
    made._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]
    parameters = dict(made.named_parameters(remove_duplicate=False))
    weights = {each.layer.partition(":")[0]: each for report in reports
               if isinstance(report, Operands) for each in report.quantized
               if each.role == "fprop.w"}
    with torch.no_grad():
        if strange := sorted(set(weights) - set(parameters)):
            raise ConfigError(f"{type(model).__name__} was compiled in parts that share a graph, "
                              f"in which weights are called {', '.join(strange)}. Remedy: a model "
                              "that fullgraph=True takes")
        for name, each in weights.items():
            parameters[name].copy_(_multiplied(parameters[name], each))
    return made


def _multiplied(weight: torch.Tensor, each: Quantized) -> torch.Tensor:
    """What a forward product multiplies for a weight."""
    operand = each.operand
    if operand.hadamard or operand.stochastic or operand.scaling != "current":
        raise ConfigError(f"{each.layer} is multiplied rotated, rounded stochastically or at a "
                          "scale of other steps: no weight alone is what the product reads")
    matrix = weight if weight.ndim == 2 else weight.flatten(1)
    soft = estimators.forward(operand.estimator, matrix, operand.format, each.axis)
    return fake_quantize(soft, operand.format, each.axis).reshape(weight.shape)
