"""Capture of one training step, its loss included, to look at: nothing is compiled or changed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch._dynamo import config as dynamo_config

from scaleprop.backends.graphs import compile_joint, given_inputs
from scaleprop.errors import CaptureError, ConfigError, ScalePropError

_REMEDY = "Remedy: call what breaks the graph outside the model, or analyze a part of it."


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """A model and its loss as graphs, with real inputs.

    torch_level: what Dynamo captured, in torch functions, forward only; given: its inputs.
    joint: forward and backward, in ATen; inputs: its inputs, 1 for the loss's gradient. loss: its
    output that is the loss. parameters: its inputs that are parameters → their names; gradients:
    its outputs that are gradients of parameters → their names.
    """

    torch_level: torch.fx.GraphModule
    given: Sequence[Any]
    joint: torch.fx.GraphModule
    inputs: Sequence[Any]
    loss: torch.fx.Node
    parameters: Mapping[torch.fx.Node, str]
    gradients: Mapping[torch.fx.Node, str]


class _Enough(Exception):
    """The step was captured; it need not run."""


def capture_training(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any],
    loss_of: Callable[[Any], Any],
) -> TrainingStep:
    """The graphs of ``loss_of(model(*args, **kwargs))`` and of its gradients.

    Raises:
        ConfigError: where the loss is no float scalar, or nothing that it depends on is learned.
        CaptureError: where Dynamo cannot take the whole step as one graph, or inputs have no data.
    """
    names = {id(value): name for name, value in model.named_parameters()}
    found: list[TrainingStep | ScalePropError] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        return loss_of(model(*args, **kwargs))

    call.__code__ = call.__code__.replace()  # or calls for other models would count as this one's

    def backend(graph: torch.fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        problem = _problem(graph)
        if problem:
            found.append(ConfigError(problem))
        else:
            compile_joint(graph, given, lambda joint: found.append(
                _attempt(graph, given, joint, names)), "eager")

        def stop(*_: Any) -> Any:
            raise _Enough

        return stop

    traced = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)
    # what a model logs would break its graph in two
    silenced = {method for method in vars(logging.Logger).values() if callable(method)}
    try:
        with torch.enable_grad(), dynamo_config.patch(ignore_logging_functions=silenced):
            traced(*args, **kwargs)
    except _Enough:
        pass
    except Exception as error:
        raise CaptureError(f"{type(model).__name__} and its loss are not one graph: "
                           f"{type(error).__name__}: {_first(error)}. {_REMEDY}") from error
    if not found:
        raise ConfigError(f"the loss of {type(model).__name__} does not depend on its inputs or "
                          "parameters")
    if isinstance(found[0], ScalePropError):
        raise found[0]
    return found[0]


def _first(error: Exception) -> str:
    """The first paragraph of a message; Dynamo's have many."""
    return str(error).strip().split("\n\n")[0].rstrip(".")


def _problem(graph: torch.fx.GraphModule) -> str:
    """What is wrong with the loss; "" where nothing is."""
    (outputs,) = graph.graph.output_node().args
    first: Any = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    value = first.meta.get("example_value") if isinstance(first, torch.fx.Node) else first
    if not isinstance(value, torch.Tensor) or value.ndim or not value.is_floating_point():
        is_ = f"a tensor {tuple(value.shape)} of {value.dtype}" \
            if isinstance(value, torch.Tensor) else type(value).__name__
        return (f"the loss is {is_}, not one float number. Remedy: loss_fn takes the model's "
                'output and returns a scalar; loss_fn="output" takes the loss that a model returns')
    if not value.requires_grad:
        return "the loss has no gradient: no parameter that it depends on requires one"
    return ""


def _attempt(
    graph: torch.fx.GraphModule, given: Sequence[Any], joint: torch.fx.GraphModule,
    names: Mapping[int, str],
) -> TrainingStep | CaptureError:
    """``_step``, or why there is none: an error raised inside Dynamo would come out as another."""
    try:
        return _step(graph, given, joint, names)
    except CaptureError as error:
        return error


def _step(
    graph: torch.fx.GraphModule, given: Sequence[Any], joint: torch.fx.GraphModule,
    names: Mapping[int, str],
) -> TrainingStep:
    """A copy of the graphs, with inputs to run them on: compiling goes on with the originals."""
    copied = torch.fx.Graph()
    output: Any = copied.graph_copy(joint.graph, {})
    copied.output(output)
    kept = torch.fx.GraphModule(joint, copied)  # the constants that the graph reads come with it
    _, inputs = given_inputs(kept.graph, given)
    if inputs is None:
        raise CaptureError("parameters or inputs have no data: they are on the device 'meta', or "
                           "fake. Remedy: load the weights, and pass real inputs.")
    primals = kept.graph.find_nodes(op="placeholder")[:len(given)]
    of_parameter = {node: names.get(id(value), node.name)
                    for node, value in zip(primals, given, strict=True)
                    if isinstance(value, torch.nn.Parameter)}
    gradients = {
        gradient: of_parameter[node]
        for node, gradient in zip(primals, output[len(output) - len(primals):], strict=True)
        if node in of_parameter and isinstance(gradient, torch.fx.Node)
    }
    (results,) = graph.graph.output_node().args
    own = len(results) if isinstance(results, tuple | list) else 1
    loss = output[len(output) - len(primals) - own]  # behind what else the graph writes
    return TrainingStep(graph, tuple(given), kept, inputs, loss, of_parameter, gradients)
