"""Recompute every node's fake value: what shape, dtype and symbolic sizes it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx

from scaleprop import _torch_compat as compat
from scaleprop.errors import ConfigError
from scaleprop.passes.base import Program
from scaleprop.passes.guards import arithmetic


def propagate_values(program: Program) -> None:
    """Set ``meta["val"]`` of every node of ``program.module``, in place.

    Sizes named in ``program.dynamic_axes`` become symbols, one for each name; all others are those
    of the example inputs.
    """
    mode = compat.symbolic_fake_mode()
    sizes = _sizes(program, mode)
    with mode:
        inputs = [_fake(leaf, program.dynamic_axes.get(node.name, {}), sizes)
                  for node, leaf in zip(program.placeholders, program.example_leaves, strict=True)]
        _Values(program.module, mode).run(*inputs, enable_io_processing=False)


def _sizes(program: Program, mode: Any) -> dict[str, Any]:
    """Dimension name → its size: a symbol, or for ``2*batch`` what that is of others."""
    examples = {
        name: leaf.shape[axis]
        for node, leaf in zip(program.placeholders, program.example_leaves, strict=True)
        for axis, name in program.dynamic_axes.get(node.name, {}).items()
    }
    sizes: dict[str, Any] = {}
    for name in sorted(examples, key=str.isidentifier, reverse=True):  # what others are made of
        try:
            sizes[name] = arithmetic(name, sizes)
        except ConfigError:
            # 0 and 1 would be taken for fixed sizes
            sizes[name] = compat.fake_size(mode, name, max(2, examples[name]))
    return sizes


def _fake(leaf: Any, axes: Mapping[int, str], sizes: Mapping[str, Any]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = [sizes[axes[axis]] if axis in axes else size for axis, size in enumerate(leaf.shape)]
    return torch.empty(shape, dtype=leaf.dtype, device=leaf.device)


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
