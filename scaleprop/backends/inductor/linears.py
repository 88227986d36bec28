"""What becomes of each ``scaled_mm``: which kernel, which prepared weight, which epilogue.

- INT8 × INT8 (per tensor or per token, with or without zero point) and E4M3 × E4M3 (per tensor or
  per token): one oneDNN linear on packed 8-bit weights. INT8 sums are exact in int32, FP8 ones are
  accumulated in float32. A GELU or ReLU behind it, and the static quantization behind that, run in
  the linear's epilogue.
- Everything else: x̂ (fake-quantized at run time) times ŵ, dequantized once when compiled, in a
  packed float32 linear. Weights then take 4 bytes each in memory, whatever the format. (torch's
  linears on packed INT8 or INT4 weights are 4 to 300 times slower than this for float32 data.)
  With ``compute="bfloat16"``: a bfloat16 linear, 2 bytes each. MX operands are exact in bfloat16,
  sums are float32, results are rounded to bfloat16.

Linears that read the same quantized input are merged into one.

How far results are from the reference: both kinds scale and add the bias in float32, so one linear
is within float32 rounding of a K-term sum (measured ≤ 2e-6 of the largest output). Where a sum
lies next to a rounding boundary of the following quantization, that code may differ by one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
import torch.fx
from torch import Tensor

from scaleprop import ops
from scaleprop.backends.inductor import compat
from scaleprop.errors import LoweringError, describe
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.scaled import PLAIN, ScaledFormat, parse
from scaleprop.formats.tensor import dequantize_parts

Constants: TypeAlias = Mapping[torch.fx.Node, Tensor]

_MANY_ROWS = 256
_ACTIVATIONS = {torch.ops.aten.gelu.default: "gelu", torch.ops.aten.relu.default: "relu"}
# Their results are new tensors, whatever Inductor simplifies.
_NORMS = {torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A prepared constant, and the shape and dtype that tracing is shown in its place."""

    tensor: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What runs inside a linear after its bias: an activation and a static quantization, or the
    addition of ``other``, a tensor of the result's shape that is known by then.

    in_place: ``other`` is read for the last time, and may hold the sum.
    """

    activation: torch.fx.Node | None = None
    post_op: str = "none"
    algorithm: str = ""
    quantize: torch.fx.Node | None = None
    scale: float = 1.0
    zero_point: int = 0
    dtype: torch.dtype = torch.float32
    add: torch.fx.Node | None = None
    other: torch.fx.Node | None = None
    in_place: bool = False

    @property
    def nodes(self) -> tuple[torch.fx.Node, ...]:
        """The nodes that need no code of their own."""
        parts = (self.activation, self.quantize, self.add)
        return tuple(node for node in parts if node is not None)


@dataclasses.dataclass(frozen=True)
class Operand:
    """The arguments of a ``scaled_mm`` node, parsed. x is a quantize node, or a plain value."""

    node: torch.fx.Node
    x: torch.fx.Node
    x_format: ScaledFormat | None
    weight: tuple[torch.fx.Node, ...]
    w_format: ScaledFormat | None
    bias: torch.fx.Node | None
    k: int

    @property
    def static_scales(self) -> tuple[torch.fx.Node, ...] | None:
        """Scale (and zero point) nodes where they are given, else None."""
        return given_scales(self.x) if self.x_format is not None else None


@dataclasses.dataclass(frozen=True)
class Linear:
    """One kernel call for one or more ``scaled_mm`` nodes that read the same input.

    kind: ``int8``, ``fp8``, ``float``, or ``open``: weights that are computed at run time, in plain
        float32 operators. members: each node with its range of output columns.
    constants: prepared tensors by name: weight, scale, zero_point, bias, column_sum.
    given: static (scale, zero point) of x, where x is quantized per tensor.
    """

    kind: str
    operand: Operand
    members: tuple[tuple[torch.fx.Node, int, int], ...]
    constants: Mapping[str, Weight]
    epilogue: Epilogue = Epilogue()
    given: tuple[float, int] | None = None

    @property
    def description(self) -> str:
        """For the report."""
        x = self.operand.x_format
        merged = f", {len(self.members)} merged" if len(self.members) > 1 else ""
        if self.kind == "float":
            source = "x" if x is None else f"x̂ ({x})"
            width = "bf16" if self.constants["weight"].dtype == torch.bfloat16 else "f32"
            return f"oneDNN linear {width}: {source} × ŵ ({self.operand.w_format}){merged}"
        assert x is not None
        types = "e4m3×e4m3" if self.kind == "fp8" else ("u8×s8" if x.zero_point else "s8×s8")
        scaling = "static" if self.given else f"per {_GRAIN[x.granularity.kind]}"
        after = "".join(f"+{part}" for part in (
            self.epilogue.post_op if self.epilogue.activation is not None else "",
            "quantize" if self.epilogue.quantize is not None else "",
            "add" if self.epilogue.add is not None else "") if part)
        return f"oneDNN qlinear {types} {scaling}{after}{merged}"


_GRAIN = {"tensor": "tensor", "row": "token"}


def read(node: torch.fx.Node) -> Operand:
    """The operands of a ``scaled_mm`` node.

    Raises:
        LoweringError: for a form that passes do not make.
    """
    x, w, bias, x_name, w_name, k = node.args
    if isinstance(x, (list, tuple)) and len(x) == 1 and x_name in PLAIN:
        x = x[0]
    quantized = isinstance(x, torch.fx.Node) and x.target is ops.quantize
    weight = tuple(w) if isinstance(w, (list, tuple)) else ()
    if not isinstance(x, torch.fx.Node) or quantized == (x_name in PLAIN) or not all(
        isinstance(part, torch.fx.Node) for part in weight
    ) or not weight or not isinstance(k, int):
        raise LoweringError(
            f"{describe(node)}: the inductor backend takes scaled_mm(quantize(x) or [x], "
            "[weight parts], bias, x format, w format, k) with a fixed k. Run the passes of a "
            "recipe, or use backend='reference'."
        )
    formats = [None if name in PLAIN else parse(str(name)) for name in (x_name, w_name)]
    return Operand(node, x, formats[0], weight, formats[1],  # type: ignore[arg-type]
                   bias, k)  # type: ignore[arg-type]


def given_scales(quantize: torch.fx.Node) -> tuple[torch.fx.Node, ...] | None:
    """The ``scales`` argument of a quantize node."""
    positional = quantize.args[5] if len(quantize.args) > 5 else None
    scales: Any = quantize.kwargs.get("scales", positional)
    return None if scales is None else tuple(scales)


def rounds_to_nearest(quantize: torch.fx.Node) -> bool:
    """Whether a quantize node takes no random bits."""
    args = quantize.args
    return quantize.kwargs.get("rounding", args[3] if len(args) > 3 else "nearest") == "nearest"


def is_int8(fmt: ScaledFormat | None) -> bool:
    """INT8 with one scale per tensor or row."""
    return (fmt is not None and isinstance(fmt.element, IntegerElement) and fmt.bits == 8
            and fmt.element.unit == 1.0 and not fmt.two_level
            and fmt.granularity.kind in ("tensor", "row"))


def is_fp8(fmt: ScaledFormat | None) -> bool:
    """E4M3 with one scale per tensor or row."""
    return (fmt is not None and fmt.element.name == "e4m3" and not fmt.two_level
            and fmt.granularity.kind in ("tensor", "row"))


def _grain(fmt: ScaledFormat | None) -> str | None:
    return None if fmt is None else fmt.granularity.kind


def plan(graph: torch.fx.Graph, constants: Constants,
         compute: torch.dtype = torch.float32) -> list[Linear]:
    """A kernel for every ``scaled_mm``, in graph order. compute: what attention computes in."""
    nodes = [node for node in graph.nodes if node.target is ops.scaled_mm]
    position = {node: index for index, node in enumerate(graph.nodes)}
    groups: dict[tuple[Any, ...], list[tuple[Operand, Epilogue]]] = {}
    sums: set[torch.fx.Node] = set()
    for node in nodes:
        operand = read(node)
        kind = _kind(operand, constants, compute)
        per_tensor = kind == "int8" and _grain(operand.x_format) == "tensor"
        epilogue = _epilogue(node, constants, position) if per_tensor else Epilogue()
        if (add := epilogue.add) is not None:
            spent = _is_spent(epilogue, node, sums)
            epilogue = dataclasses.replace(epilogue, in_place=spent)
            sums.add(add)
        alone = bool(epilogue.nodes) or kind == "open" or not _merges(operand, compute)
        key = (kind, operand.x, operand.k, str(operand.w_format), node if alone else None)
        groups.setdefault(key, []).append((operand, epilogue))
    return [_linear(key[0], members, constants, compute) for key, members in groups.items()]


def _kind(operand: Operand, constants: Constants, compute: torch.dtype) -> str:
    """``int8``, ``fp8``, ``float``, or ``open`` where weights or bias are not constants."""
    fixed = (*operand.weight, *(() if operand.bias is None else (operand.bias,)))
    if not all(part in constants for part in fixed):
        return "open"
    if operand.x_format is None or not rounds_to_nearest(operand.x):
        return "float"
    wf, scales = operand.w_format, operand.static_scales
    if scales is not None and not all(scale in constants for scale in scales):
        return "float"
    if is_int8(operand.x_format) and is_int8(wf) and wf is not None and not wf.zero_point:
        return "int8" if int8_sums_are_exact() else "float"
    fp8 = is_fp8(operand.x_format) and is_fp8(wf) and compute == torch.float32
    if fp8 and fp8_linears_run():
        return "fp8"
    return "float"


@functools.cache
def int8_sums_are_exact() -> bool:
    """Whether products of bytes are summed in int32; before VNNI, pairs saturate in int16."""
    return compat.has_vnni()


@functools.cache
def fp8_linears_run() -> bool:
    """Whether this build of oneDNN has FP8 linears for this processor."""
    one = torch.ones(16, 16)
    try:
        packed = torch.ops.onednn.qlinear_prepack(one.to(torch.float8_e4m3fn), None)
        result = torch.ops.onednn.qlinear_pointwise(
            one.to(torch.float8_e4m3fn), 1.0, 0, packed, torch.ones(16),
            torch.zeros(16, dtype=torch.int32), None, 1.0, 0, torch.float32, "none", [], "")
    except RuntimeError:
        return False
    return bool((result == 16.0).all())


def _epilogue(node: torch.fx.Node, constants: Constants,
              position: Mapping[torch.fx.Node, int]) -> Epilogue:
    """What is behind ``node``, reads it alone, and can run inside it."""
    last, found = node, Epilogue()
    user = _only_user(node)
    if user is not None and user.target is torch.ops.aten.add.Tensor:
        return _addition(node, user, position)
    if user is not None and user.target in _ACTIVATIONS:
        approximate = user.kwargs.get("approximate", (*user.args[1:], "none")[0])
        name = _ACTIVATIONS[user.target]  # type: ignore[index]
        found = Epilogue(user, name, str(approximate) if name == "gelu" else "")
        last, user = user, _only_user(user)
    if user is None or user.target is not ops.quantize or user.args[0] is not last:
        return found
    fmt, scales = parse(str(user.args[1])), given_scales(user)
    per_tensor = is_int8(fmt) and fmt.granularity.kind == "tensor" and rounds_to_nearest(user)
    if not per_tensor or scales is None or not all(scale in constants for scale in scales):
        return found
    scale, zero_point = _static(scales, constants)
    return dataclasses.replace(found, quantize=user, scale=scale, zero_point=zero_point,
                               dtype=torch.uint8 if fmt.zero_point else torch.int8)


def _addition(node: torch.fx.Node, add: torch.fx.Node,
              position: Mapping[torch.fx.Node, int]) -> Epilogue:
    """A residual connection: same shape and dtype, computed before ``node``."""
    others = [arg for arg in add.args if isinstance(arg, torch.fx.Node) and arg is not node]
    if len(others) != 1 or add.kwargs or position[others[0]] > position[node]:
        return Epilogue()
    mine, other = node.meta["val"], others[0].meta["val"]
    if not isinstance(other, Tensor) or other.dtype != torch.float32 \
            or tuple(other.shape) != tuple(mine.shape):
        return Epilogue()
    return Epilogue(add=add, other=others[0])


def _is_spent(addition: Epilogue, node: torch.fx.Node, sums: Set[torch.fx.Node]) -> bool:
    """Whether ``node`` may write its sum over ``other``: a tensor of the program's own making that
    nobody reads later. Adding into it costs the kernel next to nothing; a third tensor 10 to 40%.

    Only readers that ``node`` depends on are surely done: a compiler may move the rest. What a
    reader returns may be a view, so its readers count as well; a linear's result is new.

    sums: residuals that earlier linears added, also new tensors.
    """
    other = addition.other
    if other is None or (other not in sums and other.target not in _NORMS):
        return False
    done = _ancestors(node) | {node}
    seen: set[torch.fx.Node] = set()
    readers = [user for user in other.users if user is not addition.add]
    while readers:
        reader = readers.pop()
        if reader.target is torch.ops.aten.sym_size.int:
            continue
        if reader not in done:
            return False
        if reader.target is not ops.scaled_mm and reader not in seen:
            readers.extend(reader.users)
        seen.add(reader)
    return True


def _ancestors(node: torch.fx.Node) -> set[torch.fx.Node]:
    """Everything that ``node`` depends on."""
    found: set[torch.fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue:
        reached = queue.pop()
        if reached not in found:
            found.add(reached)
            queue.extend(reached.all_input_nodes)
    return found


def _merges(operand: Operand, compute: torch.dtype) -> bool:
    """Whether one kernel for linears that share an input is faster.

    It is for few rows. For many, what follows pays more for reading slices of the wide result, in
    particular attention in float32 (+8% at 512 rows, measured).
    """
    value: Any = operand.x.args[0] if operand.x_format is not None else operand.x
    shape = value.meta["val"].shape
    rows = math.prod(_hint(size) for size in shape[:-1])
    return rows < _MANY_ROWS or compute != torch.float32


def _hint(size: Any) -> int:
    """The size in the example inputs; 0 where that is unknown."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 0


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _static(scales: Sequence[torch.fx.Node], constants: Constants) -> tuple[float, int]:
    values = [constants[scale] for scale in scales]
    return float(values[0]), int(values[1]) if len(values) > 1 else 0


def _linear(kind: str, group: Sequence[tuple[Operand, Epilogue]], constants: Constants,
            compute: torch.dtype) -> Linear:
    operands = [operand for operand, _ in group]
    first, epilogue = group[0]
    if kind == "open":
        return Linear(kind, first, ((first.node, 0, 0),), {})
    weights = [[constants[part] for part in operand.weight] for operand in operands]
    ends = list(itertools.accumulate(parts[0].shape[0] for parts in weights))
    members = tuple(zip((operand.node for operand in operands), [0, *ends[:-1]], ends, strict=True))
    prepared = (_dense(operands, weights, constants, compute) if kind == "float"
                else _packed(operands, weights, constants))
    given = None
    scales = first.static_scales
    if kind == "int8" and scales is not None and _grain(first.x_format) == "tensor":
        given = _static(scales, constants)
    return Linear(kind, first, members, prepared, epilogue, given)


def _bias(operands: Sequence[Operand], weights: Sequence[Sequence[Tensor]],
          constants: Constants) -> dict[str, Weight]:
    """One bias for all; none where no operand has a constant one."""
    if not any(operand.bias in constants for operand in operands if operand.bias is not None):
        return {}
    parts = [
        parts[0].new_zeros(parts[0].shape[0], dtype=torch.float32) if operand.bias is None
        else constants[operand.bias].to(torch.float32)
        for operand, parts in zip(operands, weights, strict=True)
    ]
    return {"bias": _plain(torch.cat(parts))}


def _plain(tensor: Tensor) -> Weight:
    return Weight(tensor, tuple(tensor.shape), tensor.dtype)


def _packed(operands: Sequence[Operand], weights: Sequence[Sequence[Tensor]],
            constants: Constants) -> dict[str, Weight]:
    """8-bit weights as oneDNN packs them, with a float32 scale per output channel."""
    data = torch.cat([parts[0] for parts in weights]).contiguous()
    scale = torch.cat([
        parts[1].to(torch.float32).reshape(-1).expand(parts[0].shape[0]) for parts in weights
    ]).contiguous()
    n, k = data.shape
    packed = torch.ops.onednn.qlinear_prepack(data, None)
    result = {
        "weight": Weight(packed, (k, n), data.dtype),
        "scale": _plain(scale),
        "zero_point": _plain(torch.zeros(n, dtype=torch.int32)),
        **_bias(operands, weights, constants),
    }
    fmt = operands[0].x_format
    if fmt is not None and fmt.zero_point and fmt.granularity.kind == "row":
        result["column_sum"] = _plain(data.to(torch.int32).sum(1).to(torch.float32) * scale)
    return result


def _dense(operands: Sequence[Operand], weights: Sequence[Sequence[Tensor]],
           constants: Constants, dtype: torch.dtype) -> dict[str, Weight]:
    """Dequantized weights, packed by oneDNN."""
    dense = torch.cat([
        parts[0].to(torch.float32) if operand.w_format is None
        else dequantize_parts(parts, operand.w_format, (parts[0].shape[0], operand.k))
        for operand, parts in zip(operands, weights, strict=True)
    ]).to(dtype).contiguous()
    n, k = dense.shape
    packed = torch.ops.mkldnn._reorder_linear_weight(dense, None)
    bias = {name: _plain(weight.tensor.to(dtype))
            for name, weight in _bias(operands, weights, constants).items()}
    return {"weight": Weight(packed, (n, k), dtype), **bias}
