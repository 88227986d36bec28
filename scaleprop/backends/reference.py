"""The reference backend: the graph, node by node, in eager PyTorch with the exact kernels.

Slow and obvious. It defines what a scaled program means; the other backends are compared with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx
from torch.utils import _pytree as pytree

import scaleprop.ops as _operators  # registers scaleprop::*
from scaleprop.backends.base import Backend, Executable
from scaleprop.passes.base import Program

_QUANTIZED = {
    _operators.quantize: "exact quantize",
    _operators.dequantize: "exact dequantize",
    _operators.fake_quantize: "exact fake quantize",
    _operators.scaled_mm: "float64 products and sum",
    _operators.hadamard: "float32 butterflies",
}


@dataclasses.dataclass(frozen=True)
class ReferenceExecutable(Executable):
    """Interprets a program's graph; each value is dropped after its last use."""

    module: torch.fx.GraphModule

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        with torch.no_grad():
            interpreter = torch.fx.Interpreter(self.module)
            outputs = interpreter.run(*leaves, enable_io_processing=False)
        return pytree.tree_leaves(outputs)

    @property
    def lowerings(self) -> Mapping[str, str]:
        return {node.name: _QUANTIZED[node.target] for node in self.module.graph.nodes
                if node.target in _QUANTIZED}


@dataclasses.dataclass(frozen=True)
class ReferenceBackend(Backend):
    """Runs programs as they are."""

    name: ClassVar[str] = "reference"

    def lower(self, program: Program) -> ReferenceExecutable:
        """``program`` on a graph of its own: later changes to the program do not reach it."""
        return ReferenceExecutable(program.fork().module)
