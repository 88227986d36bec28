"""How passes change graphs: every node made here has a fake value, a source and a provenance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

from scaleprop import _torch_compat
from scaleprop.passes.base import PROVENANCE, Program, Provenance


class Rewriter:
    """A fork of a program, being rewritten by one pass."""

    def __init__(self, program: Program, by: str) -> None:
        self.program = program.fork()
        self.module = self.program.module
        self.graph = self.module.graph
        self.by = by
        self.modified = False
        self.renamed: dict[str, str] = {}  # replaced node → its successor, for records
        self._made: set[torch.fx.Node] = set()
        self._mode = _torch_compat.fake_mode_of(self.graph)

    def call(
        self,
        op: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        at: torch.fx.Node,
        why: str,
    ) -> torch.fx.Node:
        """A new call, right before ``at``, whose source location it takes over."""
        name = str(op).split(".")[1] if "." in str(op) else None
        with self.graph.inserting_before(at):
            node = self.graph.create_node(
                "call_function", op, tuple(args), dict(kwargs or {}), name=name
            )
        self._describe(node, at, why)

        def value(argument: torch.fx.Node) -> Any:
            return argument.meta["val"]

        fake_args, fake_kwargs = map_arg((node.args, node.kwargs), value)
        with self._mode, torch.no_grad():
            node.meta["val"] = op(*fake_args, **fake_kwargs)
        return node

    def constant(
        self, tensor: torch.Tensor, name: str, *, at: torch.fx.Node, why: str
    ) -> torch.fx.Node:
        """A new buffer of the module and the ``get_attr`` node that reads it."""
        path, _, leaf = name.rpartition(".")
        owner = _submodule(self.module, path)
        while hasattr(owner, leaf):
            leaf += "_"
        shelf = self.program.shelf
        owner.register_buffer(leaf, tensor if shelf is None else shelf.put(tensor))
        with self.graph.inserting_before(at):
            node = self.graph.get_attr(f"{path}.{leaf}" if path else leaf)
        self._describe(node, at, why)
        node.meta["val"] = self._mode.from_tensor(tensor, static_shapes=True)
        return node

    def replace(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """Let every user of ``old`` read ``new``."""
        self.modified = True
        if new in self._made:
            self.renamed.setdefault(old.name, new.name)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        if not old.users:
            self.graph.erase_node(old)

    def take_name(self, old: torch.fx.Node, new: torch.fx.Node) -> None:
        """The tensor behind ``new`` is called as that behind ``old``, a ``get_attr`` node that
        nothing reads any more: patterns over parameters' names go on matching."""
        target = str(old.target)
        self.graph.erase_node(old)
        if any(node.op == "get_attr" and node.target == target for node in self.graph.nodes):
            return
        tensor = self.tensor(new)
        for name in (target, str(new.target)):
            path, _, leaf = name.rpartition(".")
            delattr(_submodule(self.module, path), leaf)
        path, _, leaf = target.rpartition(".")
        _submodule(self.module, path).register_buffer(leaf, tensor)
        new.target = target

    def constant_value(self, node: Any) -> torch.Tensor | None:
        """What ``node`` is, where it is made of parameters and buffers alone; None elsewhere."""
        if not isinstance(node, torch.fx.Node) or parameters_behind(node) is None:
            return None
        known: dict[torch.fx.Node, Any] = {}

        def value(source: torch.fx.Node) -> Any:
            if source not in known:
                target: Any = source.target
                args, kwargs = map_arg((source.args, source.kwargs), value)
                is_call = source.op == "call_function"
                known[source] = target(*args, **kwargs) if is_call else self.tensor(source)
            return known[source]

        with torch.no_grad():
            return value(node)

    def tensor(self, node: Any) -> torch.Tensor | None:
        """The tensor that a ``get_attr`` node reads; None for everything else."""
        if not isinstance(node, torch.fx.Node) or node.op != "get_attr":
            return None
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value if isinstance(value, torch.Tensor) else None

    def finish(self) -> Program:
        """The rewritten program, without dead nodes and without tensors that nothing reads."""
        if not self.modified:
            return self.program
        self.graph.eliminate_dead_code()
        old = self.program
        records = tuple(
            dataclasses.replace(record, node=self.renamed.get(record.node, record.node))
            for record in old.records
        )
        transforms = tuple(
            dataclasses.replace(record, readers=tuple(
                self.renamed.get(reader, reader) for reader in record.readers))
            for record in old.transforms
        )
        moved = {new: old.statistics[name] for name, new in self.renamed.items()
                 if name in old.statistics}  # fmt: skip
        return old.replace(
            module=torch.fx.GraphModule(self.module, self.graph),
            records=records,
            transforms=transforms,
            statistics={**old.statistics, **moved},
        )

    def _describe(self, node: torch.fx.Node, source: torch.fx.Node, why: str) -> None:
        for key in ("stack_trace", "nn_module_stack"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        self._made.add(node)
        earlier = source.meta.get(PROVENANCE)
        origin = earlier.source if isinstance(earlier, Provenance) else source.name
        node.meta[PROVENANCE] = Provenance(by=self.by, why=why, source=origin)


def parameters_behind(node: torch.fx.Node) -> list[torch.fx.Node] | None:
    """The parameters and buffers that ``node`` is made of, the nearest first; None where an input
    of the graph, or something random, is behind it as well."""
    pending, seen = [node], {node: None}
    while pending:
        source = pending.pop(0)
        is_random = torch.Tag.nondeterministic_seeded in getattr(source.target, "tags", ())
        if is_random or source.op not in ("get_attr", "call_function"):
            return None
        new = [earlier for earlier in source.all_input_nodes if earlier not in seen]
        seen.update(dict.fromkeys(new))
        pending += new
    return [source for source in seen if source.op == "get_attr"]


def shape_of(node: torch.fx.Node) -> tuple[int | str, ...]:
    """The node's shape for people: integers, and symbolic sizes as text."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    sizes: tuple[Any, ...] = tuple(value.shape)
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)


def _submodule(root: torch.nn.Module, path: str) -> torch.nn.Module:
    module = root
    for part in filter(None, path.split(".")):
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    return module
