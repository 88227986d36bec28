"""ATen lowerings by family. Importing the package registers them."""

from __future__ import annotations

from scaleprop.backends.onnxruntime.aten import (
    activations,
    attention,
    creation,
    elementwise,
    indexing,
    linear,
    logic,
    norms,
    pooling,
    reductions,
    symbolic,
    views,
)
from scaleprop.backends.onnxruntime.aten.linear import register_transformers

__all__ = [
    "activations", "attention", "creation", "elementwise", "indexing", "linear", "logic", "norms",
    "pooling", "reductions", "register_transformers", "symbolic", "views",
]  # fmt: skip
