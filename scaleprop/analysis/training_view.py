"""A block of a training step: what its products read in low precision, forward and backward; or how
large its values and their gradients are."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

from scaleprop import _torch_compat as compat
from scaleprop.analysis.blocks import block_of, chosen_block
from scaleprop.analysis.scales import loss_function
from scaleprop.backends.dynamo import Options, compile_with
from scaleprop.backends.joint import TrainingStep, capture_training
from scaleprop.backends.state import TrainingState
from scaleprop.errors import ConfigError
from scaleprop.passes.outline import Outline, Read, Step, forward_outline
from scaleprop.passes.statistics import Measured
from scaleprop.passes.statistics.measure import own_random_state
from scaleprop.passes.training import Lowered
from scaleprop.passes.training.layers import StepOutline
from scaleprop.passes.training.operands import Operands
from scaleprop.passes.training.roles import gradient_values
from scaleprop.report.graph import Block, Scale
from scaleprop.report.graph.model import power_of_two
from scaleprop.signature import split_example

aten: Any = torch.ops.aten
_CASTS = ("What products read: → the forward one of a value, ← backward ones of its gradient: the "
          "power of two that data are divided by, or the format where scales are found at run "
          "time. Grey: high precision")
_SIZES = ("→ RMS of the value, ← RMS of the loss's gradient with respect to it, summed over all "
          "that read it")


@dataclasses.dataclass(frozen=True)
class _Low:
    """One value in low precision: its format, and its exponent where it is fixed."""

    format: str
    exponent: int | None
    detail: str

    @property
    def scale(self) -> Scale:
        value = None if self.exponent is None else 2.0**self.exponent
        return Scale(value, format=self.format)


def prepared_block(
    report: Lowered | Operands, block: str | None = None, depth: int | None = None, made: str = ""
) -> Block:
    """A block of a prepared model's graph: its forward, with what was cast or quantized forward and
    backward.

    Raises:
        ConfigError: on an unknown block, or a report without an outline.
    """
    if report.outline is None:
        raise ConfigError("this report does not know the graph that it is of: every value was "
                          "truncated, or it was made before pictures were")
    low = _casts(report, report.outline) if isinstance(report, Lowered) else \
        _operands(report, report.outline)
    outline = _with_quantizations(report.outline.forward, low)
    facts = _PreparedFacts(low, report.high)
    return block_of(outline, block, depth, facts, _CASTS, made)


@dataclasses.dataclass(frozen=True)
class _LowValues:
    """(product, value or "" for its parameter) → what it reads; product → its gradient's."""

    activations: Mapping[tuple[str, str], _Low]
    weights: Mapping[str, _Low]
    gradients: Mapping[str, _Low]


def _casts(report: Lowered, outline: StepOutline) -> _LowValues:
    known = {(cast.value, cast.kind): _Low(cast.element, cast.exponent, _of_cast(cast))
             for cast in report.casts}
    steps = outline.forward.named()
    activations: dict[tuple[str, str], _Low] = {}
    weights: dict[str, _Low] = {}
    gradients: dict[str, _Low] = {}
    for layer in outline.layers.values():
        if layer.product in report.products:
            for read in steps[layer.product].reads:
                for name in read.via:
                    if (name, "x") in known:
                        activations[layer.product, read.source] = known[name, "x"]
                    if (name, "w") in known:
                        weights[read.source] = known[name, "w"]
        for name in layer.gradients:
            if (name, "dy") in known:
                gradients[layer.product] = known[name, "dy"]
    return _LowValues(activations, weights, gradients)


def _of_cast(cast: Any) -> str:
    amax = "" if cast.amax is None else f"amax {cast.amax:.4g}, "
    held = "scale found at run time" if cast.exponent is None else f"divided by 2^{cast.exponent}"
    return f"{cast.value} in {cast.element}: {amax}{held}{', ' if cast.why else ''}{cast.why}"


def _operands(report: Operands, outline: StepOutline) -> _LowValues:
    steps = outline.forward.named()
    activations: dict[tuple[str, str], _Low] = {}
    weights: dict[str, _Low] = {}
    gradients: dict[str, _Low] = {}
    for each in report.quantized:
        layer = outline.layers.get(each.layer)
        if layer is None or layer.product not in steps:
            continue
        operand = each.operand
        parts = (f"{each.value} in {operand.format}, {operand.scaling} scale",
                 f"rounding {operand.rounding}",
                 f"rotated by {operand.hadamard}" if operand.hadamard else "", each.why)
        low = _Low(operand.format, None, ", ".join(part for part in parts if part))
        for read in steps[layer.product].reads:
            is_weight = steps[read.source].kind == "parameter"
            if each.role == "fprop.x" and not is_weight:
                activations[layer.product, read.source] = low
            elif each.role == "fprop.w" and is_weight:
                weights[read.source] = low
        if each.role in ("dgrad.dy", "wgrad.dy"):
            gradients.setdefault(layer.product, low)
    return _LowValues(activations, weights, gradients)


def _with_quantizations(outline: Outline, low: _LowValues) -> Outline:
    """A step for each quantization of an activation, before the first product that reads it."""
    made: dict[str, Step] = {}
    steps: list[Step] = []
    for step in outline.steps:
        reads: list[Read] = []
        for read in step.reads:
            found = low.activations.get((step.name, read.source))
            if found is None:
                reads.append(read)
                continue
            name = f"{read.source} in {found.format}"
            if name not in made:
                made[name] = Step(name=name, op="quantize", kind="quantize", stack=step.stack,
                                  reads=(read,), format=found.format, source=step.source,
                                  why=found.detail)
                steps.append(made[name])
            reads.append(Read(name, (name, *read.via)))
        weight = low.weights.get(step.name) if step.kind == "parameter" else None
        steps.append(dataclasses.replace(step, reads=tuple(reads),
                                         format=weight.format if weight else step.format))
    return Outline(tuple(steps))


class _PreparedFacts:
    def __init__(self, low: _LowValues, high: Mapping[str, str]) -> None:
        self._low, self._high = low, high

    def __call__(
        self, source: Step, read: Read, reader: Step
    ) -> tuple[Scale | None, Scale | None, str]:
        forward = self._low.weights.get(source.name)
        if source.kind == "quantize":
            made = (self._low.activations.get((reader.name, each.source)) for each in source.reads)
            own = _Low(source.format, None,
                       f"{source.name} in {source.format}, by the model itself")
            forward = next(filter(None, made), own)
        backward = self._low.gradients.get(source.name)
        details = [f"{arrow} {low.detail}" for arrow, low in (("→", forward), ("←", backward))
                   if low is not None]
        if forward is None:
            reason = self._high.get(reader.name, "")
            details.insert(0, f"high precision ({source.dtype}){': ' if reason else ''}{reason}")
        return (forward.scale if forward else None, backward.scale if backward else None,
                "\n".join(details))


def measured_block(
    step: TrainingStep, block: str | None = None, depth: int | None = None, made: str = ""
) -> Block:
    """A block of a training step, with RMS forward and backward as one run measures them.

    Raises:
        ConfigError: on an unknown block.
    """
    outline = forward_outline(step.joint.graph, step.parameters, gradient_values(step.joint.graph))
    inside = set(chosen_block(outline, block).steps)
    forward, backward = _rms(step, {name for reader in outline.steps for read in reader.reads
                                    if reader.name in inside or read.source in inside
                                    for name in read.via})

    def facts(source: Step, read: Read, _: Step) -> tuple[Scale | None, Scale | None, str]:
        sizes = [next((table[name] for name in read.via if name in table), None)
                 for table in (forward, backward)]
        detail = ", ".join(f"{arrow} RMS {size:.6g} ({power_of_two(size)})"
                           for arrow, size in zip("→←", sizes, strict=True) if size is not None)
        return (*(None if size is None else Scale(size) for size in sizes), detail)  # type: ignore[return-value]

    return block_of(outline, block, depth, facts, _SIZES, made)


def _rms(
    step: TrainingStep, wanted: Collection[str]
) -> tuple[dict[str, float], dict[str, float]]:
    """RMS of each float value of the forward part that is wanted, and of the loss's gradient with
    respect to it: by autograd, as the joint graph does not say which of its values is whose
    gradient."""
    left_out = gradient_values(step.joint.graph)
    graph = step.joint.graph
    given = dict(zip(graph.find_nodes(op="placeholder"), step.inputs, strict=True))
    learned = {node: value.detach().requires_grad_(node in step.parameters)
               if isinstance(value, torch.Tensor) else value for node, value in given.items()}
    values: dict[torch.fx.Node, Any] = {}
    with torch.enable_grad(), compat.without_modes(), own_random_state(graph, step.inputs):
        for node in graph.nodes:
            if node in left_out or node.op == "output" or node.target is aten.copy_.default:
                continue
            values[node] = learned[node] if node.op == "placeholder" else \
                _value(step.joint, node, values)
        floats = {node: value for node, value in values.items()
                  if node.name in wanted and isinstance(value, torch.Tensor)
                  and value.is_floating_point()}
        tracked = {node: value for node, value in floats.items() if value.requires_grad}
        gradients: Any = torch.autograd.grad(
            values[step.loss], list(tracked.values()), allow_unused=True)
    backward = {node.name: Measured.of(gradient).rms
                for node, gradient in zip(tracked, gradients, strict=True) if gradient is not None}
    return {node.name: Measured.of(value.detach()).rms for node, value in floats.items()}, backward


def _value(module: torch.fx.GraphModule, node: torch.fx.Node, values: Mapping[Any, Any]) -> Any:
    if node.op == "get_attr":
        found: Any = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    target: Any = node.target
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: values[each])
    return target(*args, **kwargs)


def training_view(
    model: Any, example_inputs: Any, loss_fn: Any, block: str | None = None,
    depth: int | None = None,
) -> Block:
    """A picture of one block of a training step: RMS of values (→) and of the loss's gradients
    (←), as one step on ``example_inputs`` has them. Nothing is changed.

    Args:
        model, example_inputs, loss_fn: as for ``analyze``.
        block, depth: as for ``CompiledModel.graph_view``.

    Raises:
        ConfigError: on a loss that is none, or an unknown block.
        CaptureError: where model and loss are not one graph.
    """
    _check(model)
    args, kwargs = split_example(example_inputs)
    step = capture_training(model, args, kwargs, loss_function(loss_fn))
    mode = "training" if model.training else "evaluation"
    return measured_block(step, block, depth, f"one step, in {mode} mode")


def prepared_view(
    model: Any, example_inputs: Any, loss_fn: Any, recipe: str,
    block: str | None = None, depth: int | None = None,
) -> Block:
    """The same, of what a training recipe casts: of a copy of ``model`` that takes one step.

    Raises:
        ConfigError: on an unknown recipe or block, or a model of which nothing was cast.
    """
    _check(model)
    options = Options(recipe=recipe, inner="eager")  # raises here, not within torch.compile
    args, kwargs = split_example(example_inputs)
    model, loss_of = copy.deepcopy(model), loss_function(loss_fn)
    found: list[Lowered | Operands] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        return loss_of(model(*args, **kwargs))

    def backend(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        return compile_with(graph, given, options, TrainingState(0), found.append)

    call.__code__ = call.__code__.replace()  # or calls for other models would count as this one's
    with torch.enable_grad():
        torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    if not found:
        raise ConfigError(f"recipe {recipe!r} changes nothing in {type(model).__name__}: there is "
                          "nothing to draw")
    return prepared_block(found[0], block, depth, f"{recipe}, one step")


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"a training step needs a torch.nn.Module, not {type(model).__name__}: "
                          "an exported program has no gradients")
