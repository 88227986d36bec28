"""The exponents that the fp8 recipe wants, in a graph of full precision: its exact mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.backends.graphs import Inner, compile_joint, given_inputs
from scaleprop.passes.training import Formats, Lowered, lower_products

aten: Any = torch.ops.aten
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]  # a loss, and the gradient of each parameter


@dataclasses.dataclass
class Exact:
    """``torch.compile(model, backend=Exact())``.

    inner: what runs the graphs. done: what the recipe did to each joint graph, in order.
    """

    inner: Inner = "inductor"
    done: list[Lowered] = dataclasses.field(default_factory=list)

    def __call__(
        self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        def transform(joint: torch.fx.GraphModule) -> None:
            parameters, inputs = given_inputs(joint.graph, example_inputs)
            self.done.append(lower_products(joint, parameters, Formats(), inputs))
            without_casts(joint)

        return compile_joint(module, example_inputs, transform, self.inner)


def without_casts(joint: torch.fx.GraphModule) -> None:
    """Give products their factors as they were before a cast, in their own precision."""
    graph = joint.graph
    for node in graph.find_nodes(op="call_function", target=ops.cast):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=ops.gemm):
        left, right, alpha, _ = node.args
        with graph.inserting_before(node):
            result = graph.call_function(aten.mm.default, (left, right))
            result.meta = {**node.meta}
            if alpha != 1.0:
                result = graph.call_function(aten.mul.Tensor, (result, alpha))
                result.meta = {**node.meta, "val": compat.same_kind(node.meta["val"])}
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    _refresh(joint)
    graph.eliminate_dead_code()
    graph.lint()
    joint.recompile()


def _refresh(joint: torch.fx.GraphModule) -> None:
    """Values' dtypes, where data of one byte was moved."""
    with torch.no_grad(), compat.fake_mode_of(joint.graph):
        for node in joint.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor) and (
                    value.element_size() == 1 and value.is_floating_point()):
                given: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*given[0], **given[1])
