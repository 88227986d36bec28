"""The module that ``unit_scale`` returns: a graph with the model's own parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.fx

from scaleprop._torch_compat import OpOverload

if TYPE_CHECKING:
    from scaleprop.passes.unit.scale import UnitScaling

aten: Any = torch.ops.aten

# operator → where it is told whether the model trains: place, value in training (None: as captured)
_SWITCHES: dict[Any, int] = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
}
_ATTENTION: Any = aten.scaled_dot_product_attention.default
_DROPOUT_P = 4  # of attention
_COUNT: Any = aten.add_.Tensor  # batches seen, by a batch norm


class StagedGraph(torch.fx.GraphModule):
    """A graph of ATen operators whose dropout and batch norms ``train()`` and ``eval()`` switch.

    Pickles hold the graph, not generated code.
    """

    def train(self, mode: bool = True) -> Self:
        """Switch dropout and batch norms on, or off."""
        changed = [_switch(node, mode) for node in self.graph.nodes if node.op == "call_function"]
        for child in self.children():
            child.train(mode)
        self.training = mode
        if any(changed):
            self.recompile()
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        tree = torch.nn.Module()
        tree.__dict__.update({key: value for key, value in self.__dict__.items()
                              if key in _STATE})
        codegen: Any = self.graph._codegen  # pyright: ignore[reportPrivateUsage]
        attributes = {key: value for key, value in self.__dict__.items() if key in _SPECS}
        kind = UnitScaled if isinstance(self, UnitScaled) else StagedGraph
        return _restore, (kind, tree, _listed(self.graph), codegen, self.meta, attributes)


class UnitScaled(StagedGraph):
    """A model's forward as a graph of ATen operators with constant multipliers.

    Same parameters, buffers and ``state_dict`` keys as the model; called with the arguments that
    it was captured with. ``train()`` and ``eval()`` switch dropout and batch norms; what the model
    checkpoints, this does too. It compiles, exports, is copied and pickled as any module.
    """

    @property
    def scaling(self) -> UnitScaling:
        """Every constant, and what was done to each parameter."""
        is_own = any("scaling" in held for held in (self._parameters, self._buffers, self._modules))
        if is_own or "unit_scaling" not in self.meta:
            raise AttributeError("scaling")  # the model's own of that name, if any, is found then
        return self.meta["unit_scaling"]


_STATE = ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_SPECS = ("_in_spec", "_out_spec")


def _switch(node: torch.fx.Node, training: bool) -> bool:
    """Tell one operator whether the model trains; whether that is news to it."""
    if (place := _SWITCHES.get(node.target)) is not None:
        return _set(node, place, training)
    if node.target is _ATTENTION and len(node.args) > _DROPOUT_P:
        p = node.meta.setdefault("dropout_p", node.args[_DROPOUT_P])
        return _set(node, _DROPOUT_P, p if training else 0.0)
    if node.target is _COUNT and "counts" in node.meta:
        return _set(node, 1, 1 if training else 0)
    return False


def _set(node: torch.fx.Node, place: int, value: Any) -> bool:
    if node.args[place] == value:
        return False
    node.update_arg(place, value)
    return True


Kind = TypeVar("Kind", bound=StagedGraph)


class _Name(str):
    """Another node, in a listed graph."""


_KEPT = ("stack_trace", "dropout_p", "counts", "scale")


def _listed(graph: torch.fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of ``graph`` as plain values: a pickle of them needs no private class of torch."""
    listed: list[tuple[Any, ...]] = []
    for node in graph.nodes:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs),  # type: ignore[misc]
                                        lambda other: _Name(other.name))
        meta = {key: node.meta[key] for key in _KEPT if key in node.meta}
        target: Any = node.target
        if isinstance(target, OpOverload):
            target = OperatorName(str(target))
        listed.append((node.op, node.name, target, args, dict(kwargs), meta))
    return listed


class OperatorName(str):
    """``aten.add.Tensor``: operators themselves cannot be pickled."""

    def find(self, *_: Any) -> Any:  # type: ignore[override]
        namespace, packet, overload = self.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _restore(
    kind: type[Kind], tree: torch.nn.Module, listed: list[tuple[Any, ...]], codegen: Any,
    meta: Mapping[str, Any], attributes: Mapping[str, Any],
) -> Kind:
    importlib.import_module("scaleprop.ops")  # graphs may hold our own operators
    graph = torch.fx.Graph()
    nodes: dict[str, torch.fx.Node] = {}
    look: Callable[[Any], Any] = lambda value: nodes[value] if isinstance(value, _Name) else value  # noqa: E731
    for op, name, target, args, kwargs, kept in listed:
        target = target.find() if isinstance(target, OperatorName) else target
        args, kwargs = torch.fx.node.map_aggregate((args, kwargs), look)  # type: ignore[misc]
        nodes[name] = graph.create_node(op, target, args, dict(kwargs), name)
        nodes[name].meta = dict(kept)
    graph.set_codegen(codegen)
    return assemble(kind, tree, graph, meta, attributes)


def assemble(
    kind: type[Kind], tree: torch.nn.Module, graph: torch.fx.Graph, meta: Mapping[str, Any],
    attributes: Mapping[str, Any],
) -> Kind:
    """A module of ``graph`` with everything that ``tree`` holds, used or not."""
    module = kind(tree, graph)
    for key, value in tree.__dict__.items():
        if key in _STATE:
            module.__dict__[key] = value
    module.__dict__.update(attributes)
    module.meta.update(meta)
    return module
