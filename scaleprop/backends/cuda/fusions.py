"""Quantizations that one kernel computes together with what they read.

    quantize(norm(x))                rms_norm, layer_norm over the last axis
    quantize(f(gate)·up), quantize(f(x))     silu, gelu, relu, sigmoid, tanh
    quantize(hadamard(x))            blocks of 2^m, at most 128

Each where nothing else reads the value in between, which then is never in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.fx

from scaleprop import ops
from scaleprop.backends.cuda import operators
from scaleprop.backends.inductor.linears import given_scales, rounds_to_nearest
from scaleprop.backends.inductor.trace import Call
from scaleprop.formats.scaled import ScaledFormat, parse

Node = torch.fx.Node

aten: Any = torch.ops.aten
kernels: Any = torch.ops.scaleprop_cuda

_NORMS = {aten.rms_norm.default: "rms", aten.layer_norm.default: "layer"}
_FUNCTIONS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.tanh.default: "tanh",
              aten.sigmoid.default: "sigmoid"}  # fmt: skip


def fusions(graph: torch.fx.Graph, wanted: Collection[Node]) -> dict[Node, Call]:
    """quantize node → what computes its parts, of those whose parts are wanted."""
    found: dict[Node, Call] = {}
    for node in graph.nodes:
        if node.target is ops.quantize and node in wanted and (call := _fused(node)) is not None:
            found[node] = call
    return found


def _fused(node: Node) -> Call | None:
    value, name = node.args[0], str(node.args[1])
    axis: Any = node.kwargs.get("axis", (*node.args, -1)[2])
    plain = rounds_to_nearest(node) and given_scales(node) is None
    if not isinstance(value, Node) or not plain or len(value.users) > 1:
        return None
    shown = value.meta.get("val")
    if not isinstance(shown, torch.Tensor) or axis not in (-1, shown.ndim - 1):
        return None
    for rule in (_norm, _gated, _activated, _rotated):
        if (call := rule(value, name, parse(name))) is not None:
            return call
    return None


def _norm(value: Node, name: str, fmt: ScaledFormat) -> Call | None:
    kind = _NORMS.get(value.target)
    if kind is None or not operators.fuses(fmt):
        return None
    given: tuple[Any, ...] = (*value.args, *[None] * (5 - len(value.args)))
    x, axes, gain, *rest = given
    bias, eps = rest[:2] if kind == "layer" else (None, rest[0])
    if len(axes) != 1 or x.meta["val"].dtype == torch.float64:
        return None
    if eps is None:
        eps = 1e-5 if kind == "layer" else torch.finfo(torch.float32).eps  # it is computed in
    return Call(kernels.quantize_norm, (x, gain, bias, name, kind, eps, value.meta["val"].dtype),
                f"Triton {kind}_norm+quantize")


def _function(value: Any) -> str | None:
    if not isinstance(value, Node):
        return None
    if value.target is aten.gelu.default:
        return "gelu_tanh" if value.kwargs.get("approximate") == "tanh" else "gelu"
    return _FUNCTIONS.get(value.target)


def _gated(value: Node, name: str, fmt: ScaledFormat) -> Call | None:
    if value.target is not aten.mul.Tensor or not operators.fuses(fmt):
        return None
    sides: list[Any] = list(value.args)
    for gate, up in (sides, sides[::-1]):
        function = _function(gate)
        if function is None or len(gate.users) > 1 or not isinstance(up, Node):
            continue
        shown = [_seen(each) for each in (gate, up, value)]
        if shown[0] == shown[1] == shown[2] and shown[0][1] != torch.float64:
            return Call(kernels.quantize_gated, (gate.args[0], up, name, function, shown[0][1]),
                        f"Triton {function}·up+quantize")
    return None


def _seen(node: Node) -> tuple[torch.Size, torch.dtype]:
    return node.meta["val"].shape, node.meta["val"].dtype


def _activated(value: Node, name: str, fmt: ScaledFormat) -> Call | None:
    function = _function(value)
    if function is None or not operators.fuses(fmt) or _seen(value)[1] == torch.float64:
        return None
    return Call(kernels.quantize_activated, (value.args[0], name, function, _seen(value)[1]),
                f"Triton {function}+quantize")


def _rotated(value: Node, name: str, fmt: ScaledFormat) -> Call | None:
    """Of float32 alone: others are rounded after the rotation."""
    if value.target is not ops.hadamard or _seen(value)[1] != torch.float32:
        return None
    names = ("x", "block", "signs", "axis", "transpose")
    given: dict[str, Any] = dict(zip(names, value.args, strict=False)) | dict(value.kwargs)
    last = given.get("axis", -1) in (-1, len(_seen(value)[0]) - 1)
    if not last or given.get("transpose", False) or not operators.rotates(fmt, given["block"]):
        return None
    return Call(kernels.quantize_rotated, (given["x"], given.get("signs"), name, given["block"]),
                "Triton hadamard+quantize")
