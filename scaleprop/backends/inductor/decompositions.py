"""Lets Inductor fuse ``scaleprop::*`` where users call it inside their own ``torch.compile``.

The operators are opaque to autograd and to graph capture, as they should be; Inductor then replaces
them, below autograd, by the functions that its own backend here traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.decomposition import decompositions

from scaleprop import ops
from scaleprop.backends.inductor import casts
from scaleprop.ops import implementations

_FUSED: dict[Any, Callable[..., Any]] = {
    ops.quantize: casts.quantize,
    ops.dequantize: implementations.dequantize,
    ops.fake_quantize: implementations.fake_quantize,
    ops.hadamard: implementations.hadamard,
}


def register_decompositions() -> None:
    """Add ours to Inductor's table; again does nothing."""
    for op, function in _FUSED.items():
        decompositions.setdefault(op, function)
