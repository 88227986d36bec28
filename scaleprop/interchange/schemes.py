"""Formats in compressed-tensors' words: ``QuantizationArgs`` as plain data, and back.

    ours                                 num_bits  type   strategy      stored as
    int8 int4 int3 int2 [tensor]         8 4 3 2   int    tensor        pack-quantized;
    … [row]                                               channel       int-quantized where
    … [1xg]                                               group         activations are as well
    e4m3 [tensor] [row] [1xg] [rxc]      8         float  … block       naive-, float-quantized
    e4m3[1x32]*e8m0                      8         float  group         mxfp8-quantized
    e2m3[1x32]*e8m0                      6         float  group         mxfp6-pack-quantized
    e2m1[1x32]*e8m0                      4         float  group         mxfp4-pack-quantized
    e2m1[1x16]*e4m3*f32                  4         float  tensor_group  nvfp4-pack-quantized

Activations: per tensor (dynamic or static), per token ([row], dynamic), in groups (dynamic); NVFP4
with a static scale of the tensor and dynamic ones of blocks (``dynamic: local``). How a dynamic
scale is found is not said: whoever runs the model does that its own way.

Names and values: compressed-tensors 0.20, ``quantization/quant_args.py`` and
``compressors/format.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledFormat, parse
from scaleprop.formats.elements import IntegerElement
from scaleprop.recipes import Role

Args = Mapping[str, Any]

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
MX = {"e4m3": "mxfp8-quantized", "e2m3": "mxfp6-pack-quantized", "e2m1": "mxfp4-pack-quantized"}
NVFP4 = "nvfp4-pack-quantized"
FLOATS = "float-quantized"
NAIVE = "naive-quantized"

_MX_BLOCK, _NV_BLOCK = (1, 32), (1, 16)
_FLOAT_BITS = {"e4m3": 8, "e2m3": 6, "e2m1": 4}
_FLOAT_OF_BITS = {bits: name for name, bits in _FLOAT_BITS.items()}
_INTEGER_BITS = (2, 3, 4, 8)
_SCALES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# What a reader of these activations does: compressed-tensors' own scale rule for E2M1 and E2M3 is
# "even"; for E4M3 it goes up from a mantissa of 1.75, which is "rceil" but for that very value.
_MX_RULES = {"e4m3": ":rceil", "e2m3": ":even", "e2m1": ":even"}


def weight_args(fmt: ScaledFormat) -> dict[str, Any]:
    """How a weight [N, K] in this format is described.

    Raises:
        FormatError: where there are no words for it.
    """
    args = _element_args(fmt)
    if fmt.scale.name == "e8m0" or fmt.two_level:
        return {**args, **_block_args(fmt), "dynamic": False}
    if fmt.scale.name not in _SCALES.values():
        raise FormatError(f"its scales are {fmt.scale.name}: f32, bf16 and f16 are known")
    block = fmt.block
    match fmt.granularity.kind:
        case "tensor":
            args["strategy"] = "tensor"
        case "row":
            args["strategy"] = "channel"
        case "block" if block is not None:
            args |= {"strategy": "group", "group_size": block[1]}
        case "tile" if block is not None and fmt.element.name == "e4m3":
            args |= {"strategy": "block", "block_structure": list(block)}
        case _:
            raise FormatError(f"scales per [{fmt.granularity}] of {fmt.element.name} are unknown")
    if fmt.element.name == "e4m3" and block == _MX_BLOCK:
        raise FormatError("blocks of 32 of e4m3 have e8m0 scales there")
    return {**args, "dynamic": False}


def activation_args(fmt: ScaledFormat, scaling: str) -> dict[str, Any]:
    """How activations in this format, with ``static`` or ``dynamic`` scales, are described.

    Raises:
        FormatError: where there are no words for it.
    """
    args = _element_args(fmt)
    if fmt.two_level:
        if scaling != "static":
            raise FormatError("the scale of the whole tensor is found at run time, and there it is "
                              "stored (make the role static, and calibrate)")
        return {**args, **_block_args(fmt), "dynamic": "local"}
    if fmt.scale.name == "e8m0":
        return {**args, **_block_args(fmt), "dynamic": True}
    if fmt.element.name == "e2m1":
        raise FormatError("e2m1 is known as mxfp4 and nvfp4 only")
    match fmt.granularity.kind:
        case "tensor":
            return {**args, "strategy": "tensor", "dynamic": scaling != "static"}
        case "row":
            return {**args, "strategy": "token", "dynamic": True}
        case "block" if fmt.block != _MX_BLOCK or fmt.element.name != "e4m3":
            return {**args, "strategy": "group", "group_size": fmt.granularity.columns,
                    "dynamic": True}
        case _:
            raise FormatError(f"scales per [{fmt.granularity}] of activations are unknown")


def _element_args(fmt: ScaledFormat) -> dict[str, Any]:
    element = fmt.element
    if isinstance(element, IntegerElement) and element.name in _integers():
        return {"num_bits": element.bits, "type": "int", "symmetric": not fmt.zero_point}
    if element.name in _FLOAT_BITS:
        return {"num_bits": _FLOAT_BITS[element.name], "type": "float", "symmetric": True}
    raise FormatError(f"its elements are {element.name}: int2, int3, int4, int8, e4m3, e2m3 and "
                      "e2m1 are known")


def _integers() -> tuple[str, ...]:
    return tuple(f"int{bits}" for bits in _INTEGER_BITS)


def _block_args(fmt: ScaledFormat) -> dict[str, Any]:
    """Of formats whose blocks have scales of 8 bits: MX and NVFP4."""
    if fmt.two_level:
        if (fmt.element.name, fmt.block, fmt.scale.name) != ("e2m1", _NV_BLOCK, "e4m3"):
            raise FormatError("of formats with a scale of the whole tensor, nvfp4 alone is known")
        return {"strategy": "tensor_group", "group_size": _NV_BLOCK[1],
                "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
    if fmt.element.name not in MX or fmt.block != _MX_BLOCK:
        raise FormatError("e8m0 scales are known of blocks of 32 of e4m3, e2m3 and e2m1")
    return {"strategy": "group", "group_size": _MX_BLOCK[1],
            "scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}


def is_mx(args: Args) -> bool:
    """Whether blocks of 32 have powers of two for scales."""
    return args.get("group_size") == _MX_BLOCK[1] and args.get("type") == "float" and (
        args.get("num_bits") in (4, 6) or str(args.get("scale_dtype")).endswith("uint8"))


def compression(weights: Args, activations: Args | None) -> str:
    """The name of the layout in which such weights are stored."""
    if weights["type"] == "int":
        return PACKED if activations is None else INTEGERS
    if is_mx(weights):
        return MX[_FLOAT_OF_BITS[weights["num_bits"]]]
    if weights["num_bits"] == 4:
        return NVFP4
    return NAIVE if activations is None else FLOATS


def weight_format(args: Args, scale: torch.dtype) -> ScaledFormat:
    """The format of a stored weight, whose scales have this dtype.

    Raises:
        FormatError: where scaleprop has none.
    """
    name = _element_name(args)
    if is_mx(args):
        return parse(f"{name}[1x32]*e8m0")
    if args.get("strategy") == "tensor_group":
        return parse(f"{name}[1x{args.get('group_size')}]*e4m3*f32")
    if scale not in _SCALES:
        raise FormatError(f"its scales are {scale}")
    kind = _granularity(args, {"tensor": "tensor", "channel": "row"})
    return parse(f"{name}[{kind}]*{_SCALES[scale]}" + _zero_point(args))


def activation_role(args: Args) -> Role:
    """How activations are quantized.

    Raises:
        FormatError: where scaleprop has no such format.
    """
    name, dynamic = _element_name(args), args.get("dynamic", False)
    if args.get("strategy") == "tensor_group":
        if dynamic != "local":
            raise FormatError("a scale of the whole tensor found at run time beside block scales")
        return Role(format=str(parse(f"{name}[1x{args.get('group_size')}]*e4m3*f32")),
                    scaling="static")
    kind = _granularity(args, {"tensor": "tensor", "token": "row"})
    if dynamic is not True and kind != "tensor":
        raise FormatError(f"static scales per [{kind}] of activations")
    if is_mx(args):
        return Role(format=str(parse(f"{name}[1x32]*e8m0{_MX_RULES[name]}")))
    return Role(format=str(parse(f"{name}[{kind}]*f32{_zero_point(args)}")),
                scaling="dynamic" if dynamic is True else "static")


def _element_name(args: Args) -> str:
    bits, kind = args.get("num_bits", 8), args.get("type", "int")
    if kind == "int" and bits in _INTEGER_BITS:
        return f"int{bits}"
    if kind == "float" and bits in _FLOAT_OF_BITS and args.get("symmetric", True):
        return _FLOAT_OF_BITS[bits]
    asymmetric = "" if args.get("symmetric", True) else "asymmetric "
    raise FormatError(f"{asymmetric}{kind} of {bits} bits")


def _zero_point(args: Args) -> str:
    return "" if args.get("symmetric", True) else "+zp"


def _granularity(args: Args, known: Mapping[str, str]) -> str:
    strategy, group = args.get("strategy"), args.get("group_size")
    if strategy is None:  # as compressed-tensors infers it
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy == "group":
        return f"1x{group}"
    if strategy == "block" and args.get("block_structure"):
        return "x".join(map(str, args["block_structure"]))
    if not isinstance(strategy, str) or strategy not in known:
        raise FormatError(f"strategy {strategy!r}")
    return known[strategy]
