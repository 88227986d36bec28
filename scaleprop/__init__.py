"""scaleprop: carry scales through a model's graph so that low-precision numbers just work.

    compiled = scaleprop.compile(model, example_inputs, recipe="int8-dynamic")
    y = compiled(*inputs)               # same signature and output structure as the model
    compiled.report.show()
    compiled.export("model.onnx")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaleprop import adapters, interchange, optim, qat
    from scaleprop.adapters.pretrained import ScalepropConfig
    from scaleprop.analysis import analyze
    from scaleprop.api import CompiledModel, compile, from_pretrained, load
    from scaleprop.formats import (
        ElementFormat,
        ScaledFormat,
        ScaledTensor,
        dequantize,
        fake_quantize,
        quantize,
    )
    from scaleprop.monitors import Monitor
    from scaleprop.recipes import Recipe, Role
    from scaleprop.report import Report
    from scaleprop.streaming import compile_from_safetensors
    from scaleprop.sweeps import Sweep, sweep
    from scaleprop.training import prepare_training, scale_report
    from scaleprop.unit_scaling import parameter_groups, unit_scale

__version__ = "0.1.0"

_HOME = {
    "ScalepropConfig": "scaleprop.adapters.pretrained",
    **dict.fromkeys(("CompiledModel", "compile", "from_pretrained", "load"), "scaleprop.api"),
    "analyze": "scaleprop.analysis",
    **dict.fromkeys(
        ("ElementFormat", "ScaledFormat", "ScaledTensor",
         "dequantize", "fake_quantize", "quantize"),
        "scaleprop.formats",
    ),
    "Monitor": "scaleprop.monitors",
    **dict.fromkeys(("Recipe", "Role"), "scaleprop.recipes"),
    "Report": "scaleprop.report",
    "compile_from_safetensors": "scaleprop.streaming",
    **dict.fromkeys(("Sweep", "sweep"), "scaleprop.sweeps"),
    **dict.fromkeys(("prepare_training", "scale_report"), "scaleprop.training"),
    **dict.fromkeys(("parameter_groups", "unit_scale"), "scaleprop.unit_scaling"),
}
_MODULES = ("adapters", "interchange", "optim", "qat")

__all__ = [
    "CompiledModel",
    "ElementFormat",
    "Monitor",
    "Recipe",
    "Report",
    "Role",
    "ScaledFormat",
    "ScaledTensor",
    "ScalepropConfig",
    "Sweep",
    "adapters",
    "analyze",
    "compile",
    "compile_from_safetensors",
    "dequantize",
    "fake_quantize",
    "from_pretrained",
    "interchange",
    "load",
    "optim",
    "parameter_groups",
    "prepare_training",
    "qat",
    "quantize",
    "scale_report",
    "sweep",
    "unit_scale",
]


def __getattr__(name: str) -> Any:
    """Load a public name's module on first use, so that ``import scaleprop`` stays light."""
    if name in _MODULES:
        return importlib.import_module(f"scaleprop.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'scaleprop' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
