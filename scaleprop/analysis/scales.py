"""How large every value of a training step is: measured, predicted, and where it comes from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, cast

import torch
import torch.fx

from scaleprop.analysis.blocks import block_for_report
from scaleprop.analysis.ranges import LIMITS, is_moved, lost_above, lost_below
from scaleprop.backends.joint import TrainingStep, capture_training
from scaleprop.errors import CalibrationError, ConfigError, describe, source_line
from scaleprop.passes.statistics import (
    Run,
    attention_entropy,
    factors,
    findings,
    listings,
    measure,
    module_of,
    nonfinite_finding,
    predict,
    refuse_nonfinite,
    visits,
)
from scaleprop.report.scales import FORMATS, Phase, ScaleReport, TensorScale
from scaleprop.signature import split_example

aten: Any = torch.ops.aten


def look_at_training(
    model: Any, example_inputs: Any, loss_fn: Any, calibration: Any, dynamic_shapes: Any
) -> ScaleReport:
    """``analyze`` with a loss: see there."""
    from scaleprop.analysis.training_view import measured_block

    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"loss_fn needs a torch.nn.Module, not {type(model).__name__}: an "
                          "exported program has no gradients")
    for name, given in (("calibration", calibration), ("dynamic_shapes", dynamic_shapes)):
        if given is not None:
            raise ConfigError(f"{name} has no use with loss_fn: one step on example_inputs is "
                              "measured")
    args, kwargs = split_example(example_inputs)
    step = capture_training(model, args, kwargs, loss_function(loss_fn))
    run = measure(step.joint, step.inputs, step.parameters, attention_entropy, LIMITS)
    _check(step, run)
    refuse_nonfinite(run, step.loss, step.gradients, step.parameters)
    predicted = predict(step.joint.graph, run.given)
    mode = f"one step, in {'training' if model.training else 'evaluation'} mode"
    found = visits(step.torch_level, step.given, run.masks)
    rows = _Rows(step, run)
    return ScaleReport(
        model=type(model).__name__,
        tensors=tuple(rows.row(node, predicted.moments) for node in rows.nodes()),
        visits=tuple(found), listings=tuple(listings(found)),
        findings=(*nonfinite_finding(run), *findings(step.joint.graph, run, step.parameters)),
        unknown=dict(predicted.unknown),
        block=block_for_report(lambda: measured_block(step, made=mode)),
        notes=(mode,
               "given, not predicted: parameters, inputs, and what depends on neither parameters "
               "nor gradients"))


def _check(step: TrainingStep, run: Run) -> None:
    """Raise ``CalibrationError`` where a step says nothing: its gradients are no numbers."""
    for node, name in step.gradients.items():
        seen = run.measured.get(node)
        if seen is not None and seen.masked:
            raise CalibrationError(
                f"the gradient of {name!r}, {describe(node)}, is NaN or Inf on the example inputs. "
                "Remedy: pass inputs and a loss with finite gradients.")


def loss_function(loss_fn: Any) -> Callable[[Any], Any]:
    """A function of the model's output; one of another kind is refused."""
    if loss_fn == "output":
        return _own_loss
    if callable(loss_fn):
        return cast("Callable[[Any], Any]", loss_fn)
    raise ConfigError(f"loss_fn={loss_fn!r}: a function of the model's output that returns a "
                      'scalar, or "output" where the model returns its loss')


def _own_loss(output: Any) -> Any:
    """The loss that a model returns: its output, ``.loss``, ``["loss"]``, or the first of a tuple;
    what is none of them is refused where its size is seen."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    loss: Any = getattr(output, "loss", None)
    if loss is not None:
        return loss
    return output[0] if isinstance(output, tuple | list) and output else output


class _Rows:
    """Nodes of a joint graph as rows of the report."""

    def __init__(self, step: TrainingStep, run: Run) -> None:
        self._step, self._run = step, run
        self._read = _operands(step.joint.graph, run.backward)
        self._gradients: dict[torch.fx.Node, str] = {}
        for node, name in step.gradients.items():
            self._gradients.setdefault(_root(node), name)

    def nodes(self) -> list[torch.fx.Node]:
        """Every float value that does not only move another's elements."""
        return [node for node in self._run.measured
                if not is_moved(node) and node.target is not aten.copy_.default]

    def row(self, node: torch.fx.Node, predicted: Mapping[torch.fx.Node, Any]) -> TensorScale:
        """One row; a parameter's gradient has its name."""
        seen = self._run.measured[node]
        moments = predicted.get(node)
        value = node.meta["val"]
        made: Any = node.args[0] if node.target is operator.getitem else node
        own = self._step.parameters.get(node) or self._gradients.get(node, "")
        return TensorScale(
            node=node.name, op="" if node.op == "placeholder" else str(made.target),
            phase=self._phase(node), name=own, shape=tuple(int(size) for size in value.shape),
            dtype=str(value.dtype).removeprefix("torch."),
            source="" if node.op == "placeholder" else source_line(node),
            module=module_of(node), read_in=self._read.get(node, ()), count=seen.count,
            amax=seen.amax, rms=seen.rms, mean=seen.mean, kurtosis=seen.kurtosis, zeros=seen.zeros,
            masked=seen.masked, nonfinite=seen.nonfinite, exponents=seen.exponents,
            predicted=None if moments is None or node in self._run.given else moments.rms,
            underflow={name: lost_below(seen, name) for name in FORMATS},
            overflow={name: lost_above(seen, name) for name in FORMATS})

    def _phase(self, node: torch.fx.Node) -> Phase:
        if node in self._step.parameters:
            return "parameter"
        if node in self._run.backward:
            return "backward"
        return "input" if node.op == "placeholder" else "forward"


def _root(node: torch.fx.Node) -> torch.fx.Node:
    """The value that ``node`` is moved from."""
    while is_moved(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _operands(
    graph: torch.fx.Graph, backward: Collection[torch.fx.Node]
) -> Mapping[torch.fx.Node, tuple[Literal["forward", "backward"], ...]]:
    """What products read, moves undone → in which passes."""
    found: dict[torch.fx.Node, set[Literal["forward", "backward"]]] = {}
    for node in graph.nodes:
        for factor in factors(node):
            found.setdefault(_root(factor), set()).add(
                "backward" if node in backward else "forward")
    return {node: tuple(sorted(passes)) for node, passes in found.items()}
