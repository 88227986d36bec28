"""``torch.compile(model, backend="scaleprop")``: a model's forward and backward, on one graph.

Parameters stay the caller's: DDP, FSDP, checkpointing, optimizers and ``state_dict`` see an
ordinary compiled module.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.fx
from torch.utils.weak import WeakTensorKeyDictionary

from scaleprop import _torch_compat as compat
from scaleprop.backends.graphs import Inner, compile_joint, given_inputs
from scaleprop.backends.quantized import compile_quantized
from scaleprop.backends.state import TrainingState
from scaleprop.errors import ConfigError
from scaleprop.passes.statistics.peaks import predicted_amax
from scaleprop.passes.training import Lowered, lower_products
from scaleprop.passes.training.layers import step_outline
from scaleprop.passes.training.operands import Operands
from scaleprop.passes.training.solved import solved
from scaleprop.passes.training.statistics import Sizes, measured_amax
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.recipes.training_named import training_recipe

logger = logging.getLogger(__name__)

Exponents = Literal["measured", "predicted"]
_SIZES: Mapping[Exponents, Sizes] = {"measured": measured_amax, "predicted": predicted_amax}
Report = Lowered | Operands
# of graphs compiled by name: parameter → what was done to those that read it; their state by seed
_REPORTS: Any = WeakTensorKeyDictionary()
_STATES: Any = WeakTensorKeyDictionary()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What ``torch.compile(…, options={…})`` takes.

    recipe: what the products of linear layers are computed on, forward and backward: a name, see
        ``scaleprop recipes --training``, or a ``TrainingRecipe``. Sums are float32. ``fp32``:
        nothing is changed. ``bf16``: bfloat16. ``fp8``: E4M3 and, for gradients, E5M2, all held at
        exponents that suit their formats; the last layer before the loss stays high.
    inner: what runs the rewritten graph: ``inductor``, or ``eager``, operator by operator.
    exponents: what those of ``fp8`` are chosen by: values ``measured`` in one run of the first
        batch, or ``predicted`` from the sizes of inputs and parameters, by the operators' rules.
        Where these do not know a size, the scale is found at run time.
    seed: of stochastic rounding and random signs, 0..2^32-1.
    """

    recipe: str | TrainingRecipe = "fp8"
    inner: Inner = "inductor"
    exponents: Exponents = "measured"
    seed: int = 0

    def __post_init__(self) -> None:
        training_recipe(self.recipe)
        for name, known in (("inner", get_args(Inner)), ("exponents", get_args(Exponents))):
            if getattr(self, name) not in known:
                raise ConfigError(f"option {name}={getattr(self, name)!r} of backend 'scaleprop'; "
                                  f"known: {', '.join(known)}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"option seed={self.seed!r} of backend 'scaleprop': an integer in "
                              "0..2^32-1")

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> Options:
        """Checked options.

        Raises:
            ConfigError: naming an unknown option, or a wrong value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given or {}:
            if name not in known:
                raise ConfigError(f"unknown option {name!r} of backend 'scaleprop'; "
                                  f"known: {', '.join(known)}")
        return cls(**(given or {}))


def scaleprop(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point that ``torch.compile`` calls by name.

    Raises:
        ConfigError: on an unknown option, or a mode: wrapped by ``torch.compile``, as every
            backend's errors are.
    """
    if mode is not None:
        raise ConfigError(f"backend 'scaleprop' has no mode {mode!r}. Remedy: set what it stands "
                          "for in torch._inductor.config.")
    checked = Options.of(options)
    state = _OfModels(checked.seed)

    def report(lowered: Report) -> None:
        state.reports.append(lowered)
        state.of_run(example_inputs)

    return compile_with(module, example_inputs, checked, state, report)


class _OfModels(TrainingState):
    """Stands for the states of all models that a graph is run for: those of one class share it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.reports: list[Report] = []

    def of_run(self, inputs: Sequence[Any]) -> TrainingState:
        """The state of the model whose parameters are among ``inputs``, from now on known."""
        parameters = [value for value in inputs if isinstance(value, torch.nn.Parameter)]
        if not parameters:
            return self
        found = next((_STATES[each][self.seed] for each in parameters
                      if self.seed in _STATES.get(each, {})), None) or TrainingState(self.seed)
        for parameter in parameters:
            _STATES.setdefault(parameter, {}).setdefault(self.seed, found)
            known = _REPORTS.setdefault(parameter, [])
            known.extend(each for each in self.reports if not any(each is old for old in known))
        return found


def reports_of(model: torch.nn.Module) -> list[Report]:
    """What was done to the graphs that read ``model``'s parameters, compiled by name."""
    found = [report for parameter in model.parameters() for report in _REPORTS.get(parameter, [])]
    return list({id(report): report for report in found}.values())


def state_of(model: torch.nn.Module) -> TrainingState | None:
    """The training state of ``model``, compiled by name; None where it was not yet.

    Raises:
        ConfigError: where it has several: graphs that share no parameter, or other seeds.
    """
    found = {id(state): state for parameter in model.parameters()
             for state in _STATES.get(parameter, {}).values()}
    if len(found) > 1:
        raise ConfigError(f"{type(model).__name__} was compiled in {len(found)} parts with a "
                          "training state each: what belongs together is not known by name. "
                          "Remedy: scaleprop.prepare_training(model, recipe)")
    return next(iter(found.values()), None)


def compile_with(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    state: TrainingState,
    report: Callable[[Report], None] | None = None,
) -> Callable[..., Any]:
    """Compile what Dynamo captured; ``report`` hears what was done to each joint graph."""
    recipe = training_recipe(options.recipe)
    if not (recipe.operands or recipe.phases or recipe.every):
        return compile_joint(module, example_inputs, _nothing, options.inner)
    formats = solved(recipe)
    if formats is None:
        return compile_quantized(module, example_inputs, recipe, options.inner, state, report)

    def transform(joint: torch.fx.GraphModule) -> None:
        parameters, inputs = given_inputs(joint.graph, example_inputs)
        names = map(compat.source_name, module.graph.find_nodes(op="placeholder"))
        outline = step_outline(joint.graph, parameters, dict(zip(
            joint.graph.find_nodes(op="placeholder"), names, strict=False)))
        lowered = lower_products(joint, parameters, formats, inputs, _SIZES[options.exponents])
        logger.info("%d products in %s, %d high; %d values cast, %d exponents for nothing; "
                    "%d rescales", len(lowered.products), recipe.name, len(lowered.high),
                    len(lowered.casts), sum(cast.free for cast in lowered.casts), lowered.rescales)
        for cast in lowered.casts:
            if cast.why:
                logger.info("%s, %s: %s", cast.value, cast.kind, cast.why)
        if report is not None:
            report(dataclasses.replace(lowered, outline=outline))

    return compile_joint(module, example_inputs, transform, options.inner)


def _nothing(joint: torch.fx.GraphModule) -> None:
    """The pass-through transform."""
