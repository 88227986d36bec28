"""Recompute every node's fake value: what shape, dtype and symbolic sizes it has."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.passes.base import Program


def propagate_values(program: Program) -> None:
    """Set ``meta["val"]`` of every node of ``program.module``, in place.

    Sizes named in ``program.dynamic_axes`` become symbols; all others are those of the example
    inputs.
    """
    mode = compat.symbolic_fake_mode()
    flat = program.example_leaves
    inputs = [
        compat.fake_input(mode, leaf, node.name, frozenset(program.dynamic_axes.get(node.name, ())))
        if isinstance(leaf, torch.Tensor) else leaf
        for node, leaf in zip(program.placeholders, flat, strict=True)
    ]
    with mode:
        _Values(program.module, mode).run(*inputs, enable_io_processing=False)


class _Values(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, mode: Any) -> None:
        super().__init__(module)
        self._mode = mode

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op == "get_attr":
            result = self._mode.from_tensor(result, static_shapes=True)
        n.meta["val"] = result
        return result
