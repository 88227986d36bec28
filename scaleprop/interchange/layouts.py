"""Stored weights in compressed-tensors' layouts, tensor by tensor: names, dtypes and packings.

    pack-quantized        weight_packed int32 [N, ⌈K·bits/32⌉], weight_scale,
                          weight_shape int64 [2], weight_zero_point int32 [⌈N·bits/32⌉, groups]
    int-quantized         weight int8 [N, K], weight_scale, weight_zero_point int8
    naive-, float-, mxfp8-quantized
                          weight float8_e4m3fn [N, K], weight_scale (mxfp8: uint8, E8M0 codes)
    mxfp4-, mxfp6-, nvfp4-pack-quantized
                          weight_packed uint8 [N, K·bits/8], weight_scale, weight_global_scale [1]

Packed integers are a stream of bits, the first element lowest, in offset binary: code + 2^(bits-1).
Zero points have the same offset taken off. NVFP4's global scale is the reciprocal of the scale of
the whole tensor, in float32: what is read of it is that scale, or the float32 number beside it
where two have one reciprocal; written again, it is the same.

Sources: compressed-tensors 0.20, ``compressors/*/base.py`` and ``helpers.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledFormat, ScaledTensor
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.packing import crop_last, pack, packed_size, pad_last, unpack
from scaleprop.interchange import schemes
from scaleprop.interchange.schemes import Args

WORD = 4  # bytes of the int32 that codes are packed into
NAMES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape",
         "weight_global_scale")


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] of ``bits`` bits as int32 [R, ⌈C·bits/32⌉], the first code lowest."""
    stream = pack(codes, bits)
    return pad_last(stream, -(-stream.shape[-1] // WORD) * WORD).contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: the first ``count`` codes of each row, unsigned.

    Raises:
        FormatError: where the words are no int32, or too few.
    """
    if words.dtype != torch.int32 or words.ndim != 2:
        raise FormatError(f"packed codes are int32 with two axes, not {words.dtype} "
                          f"{list(words.shape)}")
    if words.shape[1] != -(-count * bits // (8 * WORD)):
        raise FormatError(f"{words.shape[1]} words hold no {count} codes of {bits} bits")
    return unpack(words.contiguous().view(torch.uint8), bits, count)


def from_codes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, fmt: ScaledFormat,
    dtype: torch.dtype = torch.float32,
) -> ScaledTensor:
    """A stored weight of integers.

    codes: unsigned [N, K], 0..2^bits-1; without a zero point 2^(bits-1) stands for 0.
    scale, zero_point: as the format stores them, up to their dtype.

    Raises:
        FormatError: where a shape is not what the format stores.
    """
    columns = fmt.granularity.columns if fmt.block else 1
    if codes.shape[1] % columns:
        raise FormatError(f"{codes.shape[1]} columns are no whole blocks of {columns}")
    bits = fmt.bits
    if not fmt.zero_point:
        codes = codes - (1 << (bits - 1))
    if bits != 8:
        data = pack(codes, bits)
    else:
        data = codes.to(torch.uint8 if fmt.zero_point else torch.int8)
    parts = [data, scale.contiguous()]
    if zero_point is not None:
        parts.append(zero_point.to(torch.uint8).contiguous())
    return ScaledTensor.from_parts(parts, fmt, codes.shape, dtype=dtype)


def written(tensor: ScaledTensor, compression: str) -> dict[str, Tensor]:
    """The tensors that a weight [N, K] is stored as, by their names within its module.

    Raises:
        FormatError: where the layout cannot hold this shape.
    """
    fmt, (_, k) = tensor.format, tensor.shape
    columns = fmt.granularity.columns if fmt.granularity.kind == "block" else 1
    if k % columns:
        raise FormatError(f"its {k} columns are no whole blocks of {columns}")
    scale = tensor.scale.reshape(1) if tensor.scale.ndim == 0 else tensor.scale
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if isinstance(fmt.element, IntegerElement):
        return _written_integers(tensor, scale, compression)
    if compression in (schemes.FLOATS, schemes.NAIVE, schemes.MX["e4m3"]):
        return {"weight": crop_last(tensor.data, k).contiguous(), "weight_scale": scale}
    parts = {"weight_packed": tensor.data, "weight_scale": scale}
    if tensor.tensor_scale is not None:
        parts["weight_global_scale"] = global_scale(tensor.tensor_scale)
    return parts


def _written_integers(tensor: ScaledTensor, scale: Tensor, compression: str) -> dict[str, Tensor]:
    bits, zero = tensor.format.bits, tensor.zero_point
    offset = 1 << (bits - 1)
    codes = tensor.codes().to(torch.int16)
    signed = codes if zero is None else codes - offset
    if compression == schemes.INTEGERS:
        parts = {"weight": signed.to(torch.int8), "weight_scale": scale}
        if zero is not None:
            shifted = (zero.to(torch.int16) - offset).to(torch.int8)
            parts["weight_zero_point"] = shifted.reshape(scale.shape)
        return parts
    parts = {
        "weight_packed": pack_words(signed + offset, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(tensor.shape),
    }
    if zero is not None:
        if zero.ndim != 2:
            raise FormatError("a zero point of the whole tensor cannot be packed")
        parts["weight_zero_point"] = pack_words(zero.t(), bits).t().contiguous()
    return parts


def global_scale(tensor_scale: Tensor) -> Tensor:
    """NVFP4's scale of the whole tensor as it is stored: its reciprocal, [1] float32."""
    return tensor_scale.to(torch.float32).reciprocal().reshape(1)


def tensor_scale(stored: Tensor) -> Tensor:
    """The inverse of ``global_scale``.

    Raises:
        FormatError: where it is not one positive number.
    """
    if stored.numel() != 1 or not bool((stored > 0) & stored.isfinite()):
        raise FormatError("its global scale is not one positive number")
    return stored.to(torch.float32).reciprocal().reshape(())


def read(parts: Mapping[str, Tensor], args: Args, compression: str,
         dtype: torch.dtype = torch.float32) -> ScaledTensor:
    """The weight that these tensors hold: ``written``, the other way.

    args: what the configuration says of weights. dtype: of the weight before it was quantized.

    Raises:
        FormatError: where a tensor is missing or does not fit, or scaleprop has no such format.
    """
    scale = _part(parts, "weight_scale")
    fmt = schemes.weight_format(args, scale.dtype)
    if isinstance(fmt.element, IntegerElement):
        return _read_integers(parts, fmt, scale, compression, dtype)
    if compression in (schemes.PACKED, schemes.INTEGERS):
        raise FormatError(f"{compression} holds integers, and the weight is {fmt.element.name}")
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    name = "weight_packed" if fmt.element.packed else "weight"
    data = _part(parts, name)
    if data.ndim != 2:
        raise FormatError(f"{name} has shape {list(data.shape)}, not two axes")
    k = data.shape[1] * 8 // fmt.bits
    if fmt.block is not None:
        size = -(-k // fmt.granularity.columns) * fmt.granularity.columns
        data = pad_last(data.view(torch.uint8), packed_size(size, fmt.bits)).view(data.dtype)
    kept: list[Tensor] = [data, _scale(scale, fmt)]
    if fmt.two_level:
        kept.append(tensor_scale(_part(parts, "weight_global_scale")))
    return ScaledTensor.from_parts(kept, fmt, (data.shape[0], k), dtype=dtype)


def _read_integers(parts: Mapping[str, Tensor], fmt: ScaledFormat, scale: Tensor,
                   compression: str, dtype: torch.dtype) -> ScaledTensor:
    offset, zero = 1 << (fmt.bits - 1), None
    if compression == schemes.PACKED:
        shape = _part(parts, "weight_shape").tolist()
        if len(shape) != 2:
            raise FormatError(f"weight_shape is {shape}, not of two axes")
        codes = unpack_words(_part(parts, "weight_packed"), fmt.bits, shape[1])
        if fmt.zero_point:
            packed = _part(parts, "weight_zero_point").t()
            zero = unpack_words(packed, fmt.bits, shape[0]).t()
    else:
        weight = _part(parts, "weight")
        if weight.dtype != torch.int8 or weight.ndim != 2:
            raise FormatError(f"weight is {weight.dtype} {list(weight.shape)}, not int8 [N, K]")
        codes = weight.to(torch.int16) + offset
        if fmt.zero_point:
            zero = _part(parts, "weight_zero_point").to(torch.int16) + offset
            zero = zero.reshape(_scale(scale, fmt).shape)
    return from_codes(codes, _scale(scale, fmt), zero, fmt, dtype)


def _scale(scale: Tensor, fmt: ScaledFormat) -> Tensor:
    """Scales of whole tensors have no axes here, those of rows two."""
    if fmt.granularity.kind == "tensor" and scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(-1, 1) if fmt.granularity.kind == "row" and scale.ndim == 1 else scale


def _part(parts: Mapping[str, Any], name: str) -> Tensor:
    if name not in parts:
        raise FormatError(f"{name} is missing: there are {', '.join(sorted(parts))}")
    return parts[name]
