"""Products of training graphs in the device's own units for FP8, MX and NVFP4.

Passes write ``gemm(values, values)`` of decoded operands, which any device multiplies, exactly, as
bfloat16 or float32. Where the device has units for what is stored, operands stay stored:

    gemm(quantize_operand(a)[0], quantize_operand(b)[0])  →  gemm(quantize(a), quantize(b))

The product takes in the scales of whole tensors, and the rounding to what is read, where nothing
else reads what is in between; else they are left to the graph. Random numbers are drawn, and blocks
rotated, where data is quantized; what is quantized along both of its axes is read for both.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.fx

from scaleprop import ops
from scaleprop.backends.cuda import library, operators, scaled
from scaleprop.backends.cuda.devices import FLOAT8, Capability
from scaleprop.backends.cuda.quantizing import ALIGNED
from scaleprop.formats.rounding import parse_rounding
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.passes.training.calls import call

Node = torch.fx.Node

aten: Any = torch.ops.aten
kernels: Any = torch.ops.scaleprop_cuda
_GET: Any = operator.getitem
_PLACES = ("x", "format", "axis", "rounding", "bits", "tensor_amax", "prescale", "headroom",
           "dtype")  # fmt: skip
_STREAMS = "streams"


class _Stored(NamedTuple):
    """A factor: what makes its values, and their format. axis: of that, which is summed over.
    drawn: arguments of random numbers, none where it is rounded to nearest."""

    made: Node
    given: dict[str, Any]
    fmt: ScaledFormat
    axis: int
    drawn: dict[str, Any]


def keep_stored(module: torch.fx.GraphModule, capability: Capability) -> int:
    """Let products read stored operands where a device of this capability multiplies them; how
    many."""
    graph = module.graph
    stored: dict[tuple[Node, int], list[Node]] = {}
    found = 0
    for node in graph.find_nodes(op="call_function", target=ops.gemm):
        left, right = _stored(node.args[0], 1), _stored(node.args[1], 0)
        if left is None or right is None or node.args[2] != 1.0 \
                or not _multiplies(left.fmt, right.fmt, capability):
            continue
        parts = [_parts(graph, factor, stored) for factor in (left, right)]
        outers = [{known[-1] for (made, _), known in stored.items() if made is factor.made}
                  for factor in (left, right) if _has_outer(factor.fmt)]
        last, whole, dtype = _result(node, outers)
        with graph.inserting_before(last):
            made = call(graph, kernels.gemm.default, (
                *parts, str(left.fmt), str(right.fmt), _size(graph, left, last), dtype, whole),
                node)
        last.replace_all_uses_with(made)
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
    whole = fmt.granularity.kind == "tensor"
    same = whole or rows == columns > 1 or given["axis"] % 2 == axis
    plain = (given.get("headroom", 1.0) == 1.0
             and (whole or given.get("tensor_amax") is None)
             and (fmt.block is not None or given.get("prescale", 1.0) == 1.0))
    drawn = _drawn(given.get("bits"))
    value = given["x"].meta["val"]
    takes = operators.quantizes(fmt, 2, mode.stochastic, False) and value.dtype != torch.float64
    if not (same and plain and takes) or drawn is None:
        return None
    return _Stored(made, given, fmt, axis, drawn)


def _drawn(bits: Node | None) -> dict[str, Any] | None:
    """Arguments that draw these numbers in a kernel, if any; None where no kernel does."""
    if bits is None:
        return {}
    if bits.target is not ops.random_bits:
        return None
    arguments: tuple[Any, ...] = bits.args
    step, stream, _, seed, _, first_row = arguments
    if not isinstance(first_row, int) or first_row % ALIGNED:
        return None
    return {"step": step, _STREAMS: [stream], "seed": seed, "first_row": first_row}


def _multiplies(x: ScaledFormat, w: ScaledFormat, capability: Capability) -> bool:
    """Whether the device has units for what is stored."""
    if all(map(_shares_steps, (x, w))):
        return capability >= FLOAT8
    return (library.kind_of_formats(x, w, capability) is not None
            or scaled.takes(x, w, capability))


def _shares_steps(fmt: ScaledFormat) -> bool:
    """Float8 of scales that a step of a product or more shares."""
    return library.is_float8(fmt) and (fmt.block is None or fmt.block[1] >= 128)


def _parts(graph: torch.fx.Graph, factor: _Stored,
           known: dict[tuple[Node, int], list[Node]]) -> list[Node]:
    """The stored parts; the scale of the whole tensor now comes from them."""
    made, given, fmt, axis, drawn = factor
    if (made, axis) in known:
        return known[made, axis]
    turn, value = _rotation(given["x"], fmt, axis)
    more = {name: given[name] for name in ("prescale", "tensor_amax")
            if given.get(name) is not None}
    with graph.inserting_before(made):
        quantized = call(graph, kernels.quantize_operand.default, (
            value, str(fmt), [axis], given.get("rounding", "nearest")), made, more | drawn | turn)
        parts = [call(graph, _GET, (quantized, place), made) for place in range(fmt.parts_count)]
    if _has_outer(fmt):
        for user in list(made.users):
            if user.target is _GET and user.args[1] == 1:
                user.replace_all_uses_with(parts[-1])
    return known.setdefault((made, axis), parts)


def _has_outer(fmt: ScaledFormat) -> bool:
    """Whether the last part is a scale of the whole tensor."""
    return fmt.granularity.kind == "tensor" or fmt.two_level


def _result(node: Node, outers: list[set[Node]]) -> tuple[Node, bool, Any]:
    """The node that a product can stand in for, whether it multiplies by the scales of whole
    tensors, and its dtype: so no sum is written, read, and scaled. outers: of each factor that has
    one, the nodes that are this scale."""
    dtype: Any = node.args[3]
    scaled = _only_user(node, aten.mul.Tensor) if outers else node
    if scaled is None or (outers and not _are_factors(scaled.args[1], outers)):
        return node, False, dtype
    rounded = _only_user(scaled, aten._to_copy.default)
    wanted: Any = None if rounded is None else rounded.kwargs.get("dtype")
    if rounded is None or set(rounded.kwargs) != {"dtype"} \
            or wanted not in (torch.bfloat16, torch.float16):
        return scaled, bool(outers), dtype
    return rounded, bool(outers), wanted


def _only_user(node: Node, target: Any) -> Node | None:
    """What alone reads the node, as its first argument, if it calls ``target``."""
    users = list(node.users)
    found = len(users) == 1 and users[0].target is target and users[0].args[0] is node
    return users[0] if found else None


def _are_factors(value: Any, outers: list[set[Node]]) -> bool:
    """Whether a value is the product of one of each."""
    if len(outers) == 1:
        return value in outers[0]
    if not isinstance(value, Node) or value.target is not aten.mul.Tensor:
        return False
    first, second = value.args
    return any(first in one and second in other for one, other in (outers, outers[::-1]))


def _rotation(value: Node, fmt: ScaledFormat, axis: int) -> tuple[dict[str, Any], Node]:
    """Arguments that rotate in the kernel, and what it then reads."""
    if value.target is not ops.rotate:
        return {}, value
    arguments: tuple[Any, ...] = value.args
    x, block, signs, along = arguments
    size = x.meta["val"].shape[axis]
    whole = isinstance(size, int) and size % block == 0  # else it is filled up with zeros first
    if along % 2 != axis or not whole or not operators.rotates(fmt, block) \
            or x.meta["val"].dtype == torch.float64:
        return {}, value
    return {"rotation": block, "signs": signs}, x


def _read_once(graph: torch.fx.Graph) -> None:
    """One kernel for both axes of a value; of what is rotated they differ."""
    first: dict[Any, Node] = {}
    for node in graph.find_nodes(op="call_function", target=kernels.quantize_operand.default):
        more: dict[str, Any] = dict(node.kwargs)
        streams = more.pop(_STREAMS, [])
        if more.get("rotation"):
            continue
        arguments: tuple[Any, ...] = node.args
        x, name, (axis,), rounding = arguments
        key = (x, name, rounding, *sorted(more.items(), key=str))
        other = first.pop((1 - axis, *key), None)
        if other is None or not all(map(_is_early, streams)):
            first[axis, *key] = node
            continue
        for stream in streams:
            other.prepend(stream)
        before: Any = other.kwargs.get(_STREAMS, [])
        count, drawn = parse(name).parts_count, [*before, *streams]
        with graph.inserting_before(other):
            both = call(graph, kernels.quantize_operand.default, (
                x, name, [1 - axis, axis], rounding), other,
                more | ({_STREAMS: drawn} if drawn else {}))
        for old, start in ((other, 0), (node, count)):
            for user in list(old.users):
                place: Any = user.args[1]
                user.args = (both, place + start)


def _is_early(node: Node) -> bool:
    """Whether all that the node reads are inputs of the graph, so that it may come sooner."""
    return all(each.op == "placeholder" for each in node.all_input_nodes)


def _size(graph: torch.fx.Graph, factor: _Stored, at: Node) -> Any:
    value = factor.given["x"]
    size = value.meta["val"].shape[factor.axis]
    if isinstance(size, int):
        return size
    with graph.inserting_before(at):
        return call(graph, aten.sym_size.int, (value, factor.axis), at)
