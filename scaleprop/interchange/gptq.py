"""Weights as GPTQ and AWQ checkpoints store them: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

    GPTQ  qweight int32 [K·bits/32, N]   words along K, the first code lowest
          qzeros  int32 [G, N·bits/32]   words along N; version 1 stores every zero point minus 1
          scales  [G, N]; g_idx int32 [K]: the group of each input channel (``desc_act``)
    AWQ   qweight int32 [K, N·bits/32]   words along N, codes in the order 0 2 4 6 1 3 5 7
          qzeros  int32 [G, N·bits/32]   likewise; scales [G, N]

    ŵ[n, k] = (code − zero point) · scale        K: input channels, N: output channels, G: groups

Version 1's zero points become those of version 2 by adding 1 in every field of a word, with carry,
which undoes the subtraction that made them also where a field had borrowed from the next.

Sources: AutoGPTQ ``qlinear_cuda.QuantLinear.pack`` (058fd80), GPTQModel
``convert_gptq_v1_to_v2_format``, AutoAWQ ``utils/packing_utils.py`` (7ee2873).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats import ScaledTensor, parse
from scaleprop.interchange.layouts import from_codes, pack_words, unpack_words

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where code i of eight lies in its word
_SCALES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def read_gptq(
    parts: Mapping[str, Tensor], bits: int, group_size: int, version: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[ScaledTensor, Tensor | None]:
    """The weight [N, K], and the order that its input channels are in; None: as they were.

    With ``desc_act`` the groups are of channels far apart: the weight's columns are then sorted by
    group, and ``order`` [K] says which channel comes where.

    Raises:
        FormatError: where the tensors do not fit one another, or groups differ in size.
    """
    qweight, qzeros, scales = (_part(parts, name) for name in ("qweight", "qzeros", "scales"))
    k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
    codes = unpack_words(qweight.t(), bits, k)
    zeros = unpack_words(_version_2(qzeros, bits) if version == 1 else qzeros, bits, n)
    size = k if group_size == -1 else group_size
    order = _order(parts.get("g_idx"), k, size)
    if order is not None:
        codes = codes[:, order]
    return _weight(codes, zeros, scales, bits, size, dtype), order


def read_awq(
    parts: Mapping[str, Tensor], bits: int, group_size: int, dtype: torch.dtype = torch.float32
) -> ScaledTensor:
    """The weight [N, K] of AWQ's layout ``gemm``.

    Raises:
        FormatError: where the tensors do not fit one another.
    """
    if bits != 4:
        raise FormatError(f"AWQ's layout is of 4 bits, not {bits}")
    qweight, scales = _part(parts, "qweight"), _part(parts, "scales")
    k, n = qweight.shape[0], qweight.shape[1] * 8
    codes = _in_order(unpack_words(qweight, bits, n)).t()
    qzeros = parts.get("qzeros")
    zeros = torch.full_like(scales, 8) if qzeros is None else _in_order(
        unpack_words(qzeros, bits, n))  # fmt: skip
    size = k if group_size == -1 else group_size
    return _weight(codes, zeros, scales, bits, size, dtype)


def _weight(codes: Tensor, zeros: Tensor, scales: Tensor, bits: int, size: int,
            dtype: torch.dtype) -> ScaledTensor:
    """codes [N, K], zeros and scales [G, N]. Zero points in the middle are none: symmetric."""
    if scales.dtype not in _SCALES or scales.shape != zeros.shape:
        raise FormatError(f"its scales are {scales.dtype} {list(scales.shape)}, its zero points "
                          f"{list(zeros.shape)}")
    is_symmetric = bool((zeros == 1 << (bits - 1)).all())
    grain = "row" if size == codes.shape[1] else f"1x{size}"
    fmt = parse(f"int{bits}[{grain}]*{_SCALES[scales.dtype]}" + ("" if is_symmetric else "+zp"))
    return from_codes(codes, scales.t(), None if is_symmetric else zeros.t(), fmt, dtype)


def _version_2(qzeros: Tensor, bits: int) -> Tensor:
    """Every field of each word plus 1; fields of 3 bits go on from one word to the next."""
    if bits == 3:
        fields = unpack_words(qzeros, bits, qzeros.shape[1] * 32 // bits)
        return pack_words((fields + 1) & 7, bits)
    ones = sum(1 << field for field in range(0, 32, bits))
    words = (qzeros.to(torch.int64) + ones) & 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _order(g_idx: Tensor | None, k: int, size: int) -> Tensor | None:
    """Channels sorted by group; None where they are."""
    if g_idx is None:
        return None
    sorted_groups = torch.arange(k) // size
    if g_idx.shape != (k,):
        raise FormatError(f"g_idx has shape {list(g_idx.shape)}, not [{k}]")
    if torch.equal(g_idx.long(), sorted_groups):
        return None
    order = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order], sorted_groups):
        raise FormatError(f"g_idx makes groups of other sizes than {size}")
    return order


def _in_order(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    return codes.reshape(rows, columns // 8, 8)[..., list(_AWQ_ORDER)].reshape(rows, columns)


def _part(parts: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in parts or parts[name].ndim != 2:
        raise FormatError(f"{name} of two axes is missing: there are {', '.join(sorted(parts))}")
    return parts[name]
