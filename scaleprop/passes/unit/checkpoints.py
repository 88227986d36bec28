"""Activation checkpointing: regions whose values are computed again on the way back.

Tracing runs what a model checkpoints as if it were not; its nodes are marked meanwhile. They are
rewritten as all others are, and put into a module of their own at the end, which is called as the
model called it: under ``torch.utils.checkpoint``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch.utils.checkpoint import checkpoint

from scaleprop._torch_compat import OpOverload, inlined_checkpoints, traced_nodes
from scaleprop.ops.scaling import scale_fwd_bwd
from scaleprop.passes.unit.module import OperatorName, StagedGraph, assemble

Options = Mapping[str, Any]
# numbers of the regions around a node, outermost first; () where there are none
Path = tuple[int, ...]

REGION = "checkpointed"  # in a node's meta: its path
_MARK = "scaleprop_checkpointed"


class Checkpointed(torch.nn.Module):
    """Runs a graph without keeping what its backward reads: that is computed again then.

    state: how many of the inputs, the first ones, belong to the module: they stay, and may be
    written to (a batch norm's statistics). options: of ``torch.utils.checkpoint.checkpoint``.
    """

    def __init__(self, body: torch.fx.GraphModule, state: int, options: Options) -> None:
        super().__init__()
        self.body = body
        self._state, self._options = state, dict(options)

    def forward(self, *inputs: Any) -> Any:
        """What the graph makes of ``inputs``: a tuple."""
        if torch.compiler.is_exporting():  # an exported program knows no checkpoints
            return self.body(*inputs)
        state, given = inputs[:self._state], inputs[self._state:]

        def run(*values: Any) -> Any:
            return self.body(*state, *values)

        return checkpoint(run, *given, use_reentrant=False, **self._options)

    def __getstate__(self) -> dict[str, Any]:
        options = _replaced(self._options, OpOverload, lambda op: OperatorName(str(op)))
        return {**self.__dict__, "_options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = _replaced(state["_options"], OperatorName, OperatorName.find)
        super().__setstate__({**state, "_options": options})


def _replaced(value: Any, kind: type[Any], by: Callable[[Any], Any]) -> Any:
    """The operators that a policy is made of, by others."""
    def inner(value: Any) -> Any:
        return _replaced(value, kind, by)

    if isinstance(value, kind):
        return by(value)
    if isinstance(value, functools.partial):
        given: functools.partial[Any] = value
        return functools.partial(given.func, *map(inner, given.args), **inner(given.keywords))
    if isinstance(value, dict):
        return {inner(key): inner(each) for key, each in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if type(value) in (list, tuple, set):
        return type(value)(map(inner, value))
    return value


class Recorder:
    """Notes the regions that tracing goes through, and marks their nodes."""

    def __init__(self) -> None:
        self.options: list[Options] = []
        self._open: list[int] = []

    @contextmanager
    def marking(self) -> Generator[None]:
        """Within, checkpointed functions run as they are, marked."""
        with inlined_checkpoints(self._region):
            yield

    @contextmanager
    def _region(self, options: Options) -> Generator[None]:
        if not torch.is_grad_enabled():  # nothing is kept there in any case
            yield
            return
        self._open.append(len(self.options))
        self.options.append(options)
        path = tuple(self._open)
        try:
            with traced_nodes() as nodes:
                yield
            for node in nodes:  # those of inner regions have their marks
                node.meta.setdefault("custom", {}).setdefault(_MARK, path)
        finally:
            self._open.pop()


def note_regions(graph: torch.fx.Graph) -> None:
    """Move tracing's marks to ``meta[REGION]``."""
    for node in graph.nodes:
        custom = node.meta.get("custom") or {}
        if _MARK in custom and node.op not in ("placeholder", "get_attr", "output"):
            node.meta[REGION] = tuple(custom[_MARK])


def outline_checkpoints(module: StagedGraph, options: Sequence[Options]) -> int:
    """Put marked regions into modules under checkpoint, in place; how many, nested ones too."""
    graph = module.graph
    _sink(graph)
    count = _outline(module, graph, options, depth=0)
    graph.lint()
    return count


def _sink(graph: torch.fx.Graph) -> None:
    """Constants move to their first reader, into its region: outside, their result would be one
    more value to keep. In every graph, so that gradients are summed in one order with regions and
    without."""
    for node in reversed(list(graph.find_nodes(op="call_function", target=scale_fwd_bwd))):
        if not node.users:
            continue
        first = min(node.users)
        first.prepend(node)
        node.meta[REGION] = first.meta.get(REGION, ())


def _outline(
    module: StagedGraph, graph: torch.fx.Graph, options: Sequence[Options], depth: int
) -> int:
    """Outline the regions at one depth of ``graph``, which becomes ``module``'s; inner ones too."""
    first: dict[int, torch.fx.Node] = {}
    last: dict[int, torch.fx.Node] = {}
    for node in graph.nodes:
        if len(path := node.meta.get(REGION, ())) > depth:
            first.setdefault(path[depth], node)
            last[path[depth]] = node
    count = 0
    for place, region in enumerate(first):
        inside = _between(first[region], last[region])
        body, inputs, state = _extract(module, graph, inside)
        count += 1 + _outline(body, body.graph, options, depth + 1)
        body.recompile()
        name = f"_checkpointed_{place}"
        module.add_module(name, Checkpointed(body, state, options[region]))
        _replace(graph, inside, body, name, inputs)
    return count


def _between(first: torch.fx.Node, last: torch.fx.Node) -> list[torch.fx.Node]:
    """The calls from ``first`` to ``last``: tracing goes through a region in one piece."""
    found = [first]
    while found[-1] is not last:
        found.append(found[-1].next)
    return [node for node in found if node.op not in ("placeholder", "get_attr")]


def _extract(
    module: StagedGraph, graph: torch.fx.Graph, inside: Sequence[torch.fx.Node]
) -> tuple[StagedGraph, list[torch.fx.Node], int]:
    """A graph of some nodes, what it reads, and how much of that is the module's state."""
    members = set(inside)
    read = dict.fromkeys(source for node in inside for source in node.all_input_nodes
                         if source not in members)
    state = [node for node in read if node.op == "get_attr"]
    inputs = [*state, *(node for node in read if node.op != "get_attr")]
    body = torch.fx.Graph()
    copies = {node: body.placeholder(node.name) for node in inputs}
    for node, copy in copies.items():
        copy.meta = {"val": node.meta.get("val")}
    for node in inside:
        copies[node] = body.node_copy(node, lambda other: copies[other])
    body.output(tuple(copies[node] for node in _leaving(inside, members)))
    root = torch.nn.Module()
    root.training = module.training
    return assemble(StagedGraph, root, body, {}, {}), inputs, len(state)


def _leaving(
    inside: Sequence[torch.fx.Node], members: Collection[torch.fx.Node]
) -> list[torch.fx.Node]:
    return [node for node in inside if any(user not in members for user in node.users)]


def _replace(
    graph: torch.fx.Graph, inside: Sequence[torch.fx.Node], body: StagedGraph, name: str,
    inputs: Sequence[torch.fx.Node],
) -> None:
    """Call the module ``name`` in place of some nodes."""
    members = set(inside)
    results = _leaving(inside, members)
    for node in inputs:  # a parameter that is first got in the middle of the region
        if not node < inside[0]:
            inside[0].prepend(node)
    with graph.inserting_after(inside[-1]):
        call = graph.call_module(name, tuple(inputs))
    call.meta = {"val": tuple(node.meta.get("val") for node in results)}
    at = call
    for place, node in enumerate(results):
        with graph.inserting_after(at):
            at = graph.call_function(operator.getitem, (call, place))
        at.meta = {key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta}
        node.replace_all_uses_with(at, lambda user: user not in members)
    for node in reversed(inside):
        graph.erase_node(node)
