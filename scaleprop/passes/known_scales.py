"""Scales that a program has stored: of its parameters, and of activations where they are static."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.fx

from scaleprop.formats.scaled import PLAIN, parse
from scaleprop.formats.scales import decoded_scale
from scaleprop.passes.operators import DEQUANTIZE, FAKE_QUANTIZE, QUANTIZE, SCALED_MM
from scaleprop.passes.outline import STORED
from scaleprop.report.graph.model import Scale

_SCALES = 5  # the argument of ``quantize`` that has static scales


def static_scales(node: torch.fx.Node) -> Any:
    """The stored scales that a quantization reads; None where it finds them at run time."""
    is_quantization = node.target in (QUANTIZE, FAKE_QUANTIZE)
    return node.args[_SCALES] if is_quantization and len(node.args) > _SCALES else None


def known_scales(
    module: torch.fx.GraphModule, wanted: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """Positive scales, float32, by the name of the node that has the codes, or that quantizes.

    wanted: the only names to look at; None for all.
    """
    found: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        for name, parts, format_ in _operands(node):
            if name in found or (wanted is not None and name not in wanted) or format_ in PLAIN:
                continue
            roots = [_root(part) for part in parts]
            if all(root.op == "get_attr" for root in roots):
                found[name] = positive_scales([_tensor(module, root) for root in roots], format_)
    return found


def stored_codes(module: torch.fx.GraphModule) -> dict[tuple[str, str], torch.fx.Node]:
    """(Parameter, format) → the node that has its codes: one parameter may be stored in several
    formats, as a table that is gathered from and a matrix that is multiplied by."""
    found: dict[tuple[str, str], torch.fx.Node] = {}
    for node in module.graph.nodes:
        stored = _stored(node)
        if stored is not None:
            codes = _root(stored[0])
            if codes.op == "get_attr":
                found.setdefault((STORED.sub("", str(codes.target)), stored[2]), codes)
    return found


def positive_scales(scales: Sequence[torch.Tensor], format_: str) -> torch.Tensor:
    """What is stored after the data: scales in full, those of nothing but zeros left out."""
    fmt = parse(format_)
    found = decoded_scale(scales[0], fmt)
    if fmt.two_level:
        found = found * scales[1]
    return found[found > 0]


def summary(scales: torch.Tensor, format_: str) -> Scale:
    """Stored scales as one: their median, least and greatest."""
    if not scales.numel():
        return Scale(None, format=format_)
    low, middle, high = (float(each) for each in (scales.min(), scales.median(), scales.max()))
    return Scale(middle, low, high, format_)


def _operands(node: torch.fx.Node) -> list[tuple[str, Sequence[Any], str]]:
    """Name, scales and format of what a node reads or makes with stored scales."""
    args: Any = node.args
    scales = static_scales(node)
    if scales is not None:
        return [(node.name, scales, args[1])]
    stored = _stored(node)
    return [(_root(stored[0]).name, stored[1], stored[2])] if stored and stored[1] else []


def _stored(node: torch.fx.Node) -> tuple[Any, Sequence[Any], str] | None:
    """Codes, scales and format of what a node reads as it is stored."""
    args: Any = node.args
    stored = {DEQUANTIZE: (0, 1), SCALED_MM: (1, 4)}.get(node.target)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if stored is None or not isinstance(args[stored[0]], list | tuple):
        return None
    codes, *parts = args[stored[0]]
    return codes, parts, args[stored[1]]


def _root(node: Any) -> torch.fx.Node:
    """What stored parts are rows of."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _tensor(module: torch.fx.GraphModule, node: torch.fx.Node) -> torch.Tensor:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach()
