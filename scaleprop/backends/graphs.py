"""The joint forward and backward graph of what Dynamo captured: transformed, then compiled.

AOTAutograd gives it with norms, softmax, activations and attention whole, because scales end there;
a transform rewrites it; then Inductor (or eager PyTorch, to debug) runs what came out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.backends import loop_split
from scaleprop.backends.subgraphs import PIECES, is_worth_sharing, share
from scaleprop.errors import CaptureError
from scaleprop.passes.decompose import respell
from scaleprop.passes.training.roles import is_tangent
from scaleprop.rules import rule_for

_COPY: Any = torch.ops.aten.copy_.default
# what Inductor fuses with its neighbours, spelled in ATen
_FUSED: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.scaleprop, name.removeprefix("scaleprop::")).default: function
    for name, function in ops.IMPLEMENTATIONS.items()}

Inner = Literal["inductor", "eager"]
# makes of a graph, forward or backward, what is called in its place: to look on as it runs
Runner = Callable[[torch.fx.GraphModule], Callable[..., Any]]
# rewrites a joint graph (or a forward one, without gradients) in place
Transform = Callable[[torch.fx.GraphModule], None]


def given_inputs(
    graph: torch.fx.Graph, example_inputs: Sequence[Any]
) -> tuple[list[torch.fx.Node], list[Any] | None]:
    """The graph's inputs that are parameters, and one real batch of all its inputs.

    Gradients come in as ones where they are a loss's, else as zeros: their size is unknown. What
    the graph writes to is copied. No batch where inputs have no data: DDP compiles a graph in as
    many pieces as it has buckets, and none but the first would have real inputs; nor has the device
    "meta" any.

    Raises:
        CaptureError: where the graph has more or fewer inputs than Dynamo's, naming why.
    """
    placeholders = graph.find_nodes(op="placeholder")
    primals = [node for node in placeholders if not is_tangent(node)]
    if len(primals) != len(example_inputs):
        raise CaptureError(_mismatch(len(primals), example_inputs))
    parameters = [node for node, value in zip(primals, example_inputs, strict=True)
                  if isinstance(value, torch.nn.Parameter)]
    if any(compat.is_fake(value) or getattr(value, "is_meta", False) for value in example_inputs):
        return parameters, None
    written = {node.args[0] for node in graph.nodes if node.target is _COPY}
    with compat.without_modes():
        values = [value.detach().clone() if node in written else value
                  for node, value in zip(primals, example_inputs, strict=True)]
        values.extend(_incoming(node.meta["val"]) for node in placeholders[len(primals):])
    return parameters, values


def _mismatch(traced: int, given: Sequence[Any]) -> str:
    """Why AOTAutograd's graph has other inputs than Dynamo's, and what to do."""
    parts = sorted({type(value).__name__ for value in given
                    if is_traceable_wrapper_subclass(value)})
    return f"AOTAutograd traced {traced} inputs of {len(given)}: " + (
        f"{', '.join(parts)} is made of several tensors. Remedy: pass them as plain tensors."
        if parts else "two of them share memory. Remedy: pass copies.")


def _incoming(like: torch.Tensor) -> torch.Tensor:
    """A gradient from outside, laid out as it was traced."""
    sizes, strides = ([compat.traced_size(size) for size in given]
                      for given in (like.shape, like.stride()))
    made = torch.empty_strided(sizes, strides, dtype=like.dtype, device=like.device)
    return made.fill_(0.0 if sizes else 1.0)


def compile_joint(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    transform: Transform,
    inner: Inner | Runner,
) -> Callable[..., Any]:
    """Compile what Dynamo captured, with ``transform`` applied to its joint graph."""

    table = spelled_table()

    def respelled(joint: torch.fx.GraphModule) -> None:
        transform(joint)
        whole = PIECES if is_worth_sharing(joint.graph) else frozenset[Any]()
        with torch.no_grad(), compat.fake_mode_of(joint.graph):
            respell(joint, table, lambda op, table: op in table and op not in whole)

    def shared(graph: torch.fx.GraphModule) -> None:
        with torch.no_grad(), compat.fake_mode_of(graph.graph):
            share(graph, table)

    if callable(inner):
        return compat.compile_eager(module, example_inputs, _loud(transform), training_table(),
                                    inner)
    if inner == "eager":
        return compat.compile_eager(module, example_inputs, _loud(transform), training_table())
    loop_split.install()
    return compat.compile_inductor(module, example_inputs, _loud(respelled), training_table(),
                                   _loud(shared))


def _loud(rewrite: Transform) -> Transform:
    """``rewrite``, none of whose errors Dynamo takes for a graph break: those that fake tensors
    raise it does, and would run the model untransformed."""

    def run(joint: torch.fx.GraphModule) -> None:
        try:
            rewrite(joint)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run


def spelled_table() -> dict[Any, Callable[..., Any]]:
    """What Inductor decomposes, and scaleprop's operators."""
    return compat.inductor_table() | _FUSED


def training_table() -> dict[Any, Callable[..., Any]]:
    """Core ATen decompositions, but none of an operator that has a rule.

    Attention stays whole too: decomposing its forward alone gives wrong gradients.
    """
    return {op: how for op, how in compat.core_table().items()
            if rule_for(op) is None and "scaled_dot_product" not in str(op)}
