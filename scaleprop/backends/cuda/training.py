"""Products of training graphs in the device's own units for FP8, MX and NVFP4.

Passes write ``gemm(values, values)`` of decoded operands, which any device multiplies, exactly, as
bfloat16 or float32. Where the device has units for what is stored, operands stay stored:

    gemm(quantize_operand(a)[0], quantize_operand(b)[0])  →  gemm(quantize(a), quantize(b))

with a scale for the whole tensor left to the graph, which multiplies the result by it, as before.
What is quantized along both of its axes is read once, where it is quantized first.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx

from scaleprop import ops
from scaleprop.backends.cuda import library, operators, scaled
from scaleprop.backends.cuda.devices import FLOAT8, Capability
from scaleprop.formats.elements import FloatElement
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.passes.training.calls import call

Node = torch.fx.Node

aten: Any = torch.ops.aten
kernels: Any = torch.ops.scaleprop_cuda
_GET: Any = operator.getitem
_PLACES = ("x", "format", "axis", "rounding", "bits", "tensor_amax", "prescale", "headroom",
           "dtype")  # fmt: skip


class _Stored(NamedTuple):
    """A factor: what makes its values, and their format. axis: of that, which is summed over."""

    made: Node
    given: dict[str, Any]
    fmt: ScaledFormat
    axis: int


def keep_stored(module: torch.fx.GraphModule, capability: Capability) -> int:
    """Let products read stored operands where a device of this capability multiplies them; how
    many."""
    graph = module.graph
    stored: dict[tuple[Node, int], list[Node]] = {}
    found = 0
    for node in graph.find_nodes(op="call_function", target=ops.gemm):
        factors = [_stored(node.args[0], 1), _stored(node.args[1], 0)]
        left, right = factors
        if left is None or right is None or node.args[2] != 1.0 \
                or not _multiplies(left.fmt, right.fmt, capability):
            continue
        parts = [_parts(graph, factor, stored) for factor in (left, right)]
        with graph.inserting_before(node):
            made = call(graph, kernels.gemm.default, (
                *parts, str(left.fmt), str(right.fmt), _size(graph, left, node), node.args[3]),
                node)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        found += 1
    _read_once(graph)
    graph.eliminate_dead_code()
    module.recompile()
    return found


def _stored(factor: Any, axis: int) -> _Stored | None:
    """A factor that is summed over ``axis``, where it is an operand that a kernel quantizes."""
    if factor.target is aten.permute.default:
        factor, axis = factor.args[0], 1 - axis
    if factor.target is not _GET or factor.args[1] != 0 \
            or factor.args[0].target is not ops.quantize_operand:
        return None
    made = factor.args[0]
    given: dict[str, Any] = dict(zip(_PLACES, made.args, strict=False)) | dict(made.kwargs)
    fmt, mode = parse(given["format"]), parse_rounding(given.get("rounding", "nearest"))
    rows, columns = fmt.block or (1, 1)
    turns = fmt.granularity.kind == "tensor" or rows == columns > 1  # the same along either axis
    same = turns or given["axis"] % 2 == axis
    plain = (given.get("tensor_amax") is None and given.get("prescale", 1.0) == 1.0
             and given.get("headroom", 1.0) == 1.0)
    value = given["x"].meta["val"]
    takes = operators.quantizes(fmt, 2, mode.stochastic, False) and value.dtype != torch.float64
    return _Stored(made, given, fmt, axis) if same and plain and takes else None


def _multiplies(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> bool:
    """Whether the device has units for what is stored."""
    if all(map(_is_float8, (x, w))):
        return capability >= FLOAT8
    return (library.kind_of_formats(x, w, capability) is not None
            or scaled.takes(x, w, capability))


def _is_float8(fmt: ScaledFormat) -> bool:
    """Of scales that a step of a product or more shares."""
    columns = 0 if fmt.block is None else fmt.block[1]
    return isinstance(fmt.element, FloatElement) and fmt.element.name in ("e4m3", "e5m2") \
        and fmt.scale.name == "f32" and not fmt.two_level and (columns == 0 or columns >= 128)


def _parts(graph: torch.fx.Graph, factor: _Stored,
           known: dict[tuple[Node, int], list[Node]]) -> list[Node]:
    """The stored parts; the scale of the whole tensor now comes from them."""
    made, given, fmt, axis = factor
    if (made, axis) in known:
        return known[made, axis]
    with graph.inserting_before(made):
        quantized = call(graph, kernels.quantize.default, (
            given["x"], str(fmt), axis, given.get("rounding", "nearest"), given.get("bits")), made)
        parts = [call(graph, _GET, (quantized, place), made) for place in range(fmt.parts_count)]
    if fmt.granularity.kind == "tensor" or fmt.two_level:
        for user in list(made.users):
            if user.target is _GET and user.args[1] == 1:
                user.replace_all_uses_with(parts[-1])
    return known.setdefault((made, axis), parts)


def _read_once(graph: torch.fx.Graph) -> None:
    """One kernel for both axes of a value."""
    first: dict[tuple[Any, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=kernels.quantize.default):
        x, name, axis, rounding, bits = node.args
        other = first.pop((x, name, 1 - axis, rounding, bits), None)
        if other is None:
            first[node.args] = node
        elif parse(name).granularity.kind == "tensor":
            _turn(graph, node, other)
        elif parse(name).block is not None:
            with graph.inserting_before(other):
                both = call(graph, kernels.quantize_both.default, (x, name, rounding, bits), other)
            for old, along in ((other, 1 - axis), (node, axis)):
                _reread(old, both, 0 if along else parse(name).parts_count)


def _turn(graph: torch.fx.Graph, node: Node, other: Node) -> None:
    """Of one scale for all, codes along one axis are those along the other, transposed."""
    parts = {user.args[1]: user for user in other.users}
    for user in list(node.users):
        made = parts[user.args[1]]
        if user.args[1] == 0:
            with graph.inserting_before(user):
                turned = call(graph, aten.permute.default, (made, [1, 0]), user)
                made = call(graph, aten.clone.default, (turned,), user,
                            {"memory_format": torch.contiguous_format})
        user.replace_all_uses_with(made)


def _reread(old: Node, both: Node, start: int) -> None:
    """Parts of ``old`` are those of ``both`` from ``start`` on; that comes first in the graph."""
    for user in list(old.users):
        place: Any = user.args[1]
        user.args = (both, place + start)


def _size(graph: torch.fx.Graph, factor: _Stored, at: Node) -> Any:
    value = factor.given["x"]
    size = value.meta["val"].shape[factor.axis]
    if isinstance(size, int):
        return size
    with graph.inserting_before(at):
        return call(graph, aten.sym_size.int, (value, factor.axis), at)
