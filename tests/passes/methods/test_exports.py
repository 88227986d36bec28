"""Transformed programs as ONNX files: what parameters absorb costs nothing, and what is left at run
time is made of ordinary operators."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.passes.base import run_as_is
from scaleprop.passes.methods import METHODS

from .small import gated, images, pictures, tokens

# what a method is for, where it is not dynamic activations of transformers
FORMATS = {"merge-quant": "int8", "two-ranges": "int8", "repq": "int8", "reorder": "nvfp4"}
IMAGES = ("equalise", "fold-batch-norms")
BEFORE = {"rotate": ("fold-norms",), "learn-rotation": ("fold-norms",)}
OPTIONS = {"learn-rotation": "{steps=1}", "rotate-pairs": "{steps=1,group=16}",
           "fire-q": "{steps=4}", "awq": "{steps=4}", "os-plus": "{steps=4}"}  # fmt: skip
OTHER = {"clip-weights", "correct-bias", "float-search", "fold-batch-norms", "two-ranges"}
NOT_IN_ONNX = {"quantize-softmax"}  # refused there: test_quantize_softmax


def compiled(method: str, recipe: str, passes: list[str]) -> scaleprop.CompiledModel:
    """Every linear has a bias: a shift needs one."""
    model, inputs = (images(), pictures(2)) if method in IMAGES else (gated(rms=False), tokens(2))
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return scaleprop.compile(model, (inputs[0],), recipe=recipe, backend="onnxruntime",
                             calibration=[(item,) for item in inputs], passes=passes)  # fmt: skip


def operators(model: scaleprop.CompiledModel) -> Counter[tuple[str, str]]:
    """Domain and type of the file's nodes; exporting also compares each with the reference."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.export(path)
        return Counter((node.domain, node.op_type) for node in onnx.load(path).graph.node)


@functools.cache
def untransformed(recipe: str, family: bool) -> Counter[tuple[str, str]]:
    return operators(compiled(IMAGES[0] if family else "", recipe, []))


@pytest.mark.parametrize("method", [kind.name for kind in METHODS if kind.name not in NOT_IN_ONNX])
def test_it_exports(method):
    recipe = FORMATS.get(method, "int8-token")
    passes = [*BEFORE.get(method, ()), method + OPTIONS.get(method, "")]
    model = compiled(method, recipe, passes)
    applied = [item for item in model.program.transforms if item.refused is None]
    assert applied or method in OTHER
    added = operators(model) - untransformed(recipe, method in IMAGES)
    assert all(domain == "" for domain, _ in added)
    if not any(item.runtime for item in applied):
        assert not added
    got, want = model(*model.program.example_args), run_as_is(model.program)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
