"""Every private or unstable torch import, in one place, so that a new torch breaks one file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._ops import OperatorBase, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram, default_decompositions
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)

__all__ = [
    "ConstraintViolationError",
    "FakeTensorMode",
    "GuardOnDataDependentSymNode",
    "OpOverload",
    "OperatorBase",
    "ShapeEnv",
    "decompose",
    "decomposition_table",
    "fake_input",
    "fake_mode_of",
    "is_decomposed",
    "symbolic_fake_mode",
    "trace",
]

# Composites that rules and backends know as one operator. Decomposing the norms, softmax and
# attention would hide where scales end; the rest have a direct counterpart on every backend.
_KEPT_WHOLE = (
    "linear", "matmul", "bilinear",
    "conv1d", "conv2d", "conv3d",
    "layer_norm", "rms_norm", "group_norm", "instance_norm",
    "softmax.int", "log_softmax.int", "_safe_softmax", "logsumexp",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",  # its decomposition breaks its fused backward
    "silu", "mish", "hardswish", "hardsigmoid", "elu", "celu", "glu", "softplus", "leaky_relu",
    "_prelu_kernel",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool1d",
    "pixel_shuffle", "pixel_unshuffle", "split.Tensor", "unbind.int", "stack",
    "tril", "triu", "one_hot",
    "sym_size.int",
)  # fmt: skip


def _overload(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def decomposition_table() -> dict[OperatorBase, Callable[..., Any]]:
    """Core ATen decompositions, except for the composites that scaleprop keeps whole."""
    table = default_decompositions()
    for name in _KEPT_WHOLE:
        table.pop(_overload(name), None)
    return table


def is_decomposed(target: Any, table: Mapping[Any, Any]) -> bool:
    """Whether tracing with ``table`` replaces an operator by others."""
    if not isinstance(target, OpOverload) or target in _kept_whole():
        return False
    return target in table or torch._C._dispatch_has_kernel_for_dispatch_key(  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        target.name(), "CompositeImplicitAutograd"
    )


@functools.cache
def _kept_whole() -> frozenset[OpOverload]:
    return frozenset(_overload(name) for name in _KEPT_WHOLE)


def trace(
    function: Callable[..., Any], values: Sequence[Any], table: dict[Any, Callable[..., Any]]
) -> torch.fx.GraphModule:
    """The graph of ``function`` on fake values, in the operators of ``table``."""
    with enable_python_dispatcher():
        return make_fx(function, decomposition_table=table, tracing_mode="real")(*values)


def decompose(exported: ExportedProgram) -> ExportedProgram:
    """``exported`` in the operators of ``decomposition_table``.

    Without example inputs ``run_decompositions`` leaves out its guard function, which mistakes
    keyword inputs of models with optional ones in between.
    """
    inputs = exported.example_inputs
    exported.example_inputs = None
    try:
        with torch.no_grad():
            return exported.run_decompositions(decomposition_table())
    finally:
        exported.example_inputs = inputs


def fake_mode_of(graph: torch.fx.Graph) -> FakeTensorMode:
    """The mode that the graph's fake values were made in; a new one where there are none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
            return value.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
    return symbolic_fake_mode()


def symbolic_fake_mode() -> FakeTensorMode:
    """A mode in which sizes can be symbols, and parameters may stay real tensors."""
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def fake_input(
    mode: FakeTensorMode, tensor: torch.Tensor, name: str, dynamic: frozenset[int]
) -> torch.Tensor:
    """A fake of ``tensor`` whose ``dynamic`` axes have symbolic sizes."""
    sizes = [
        DimDynamic.DYNAMIC if axis in dynamic else DimDynamic.STATIC for axis in range(tensor.ndim)
    ]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)  # pyright: ignore[reportCallIssue]
    return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))
