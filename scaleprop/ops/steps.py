"""What training graphs compute around a low-precision product: random bits, rotations, estimates.

Like casts and products, these are never differentiated: passes insert them into joint forward and
backward graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats import random
from scaleprop.formats.elements import FloatElement
from scaleprop.formats.elements import element as element_of
from scaleprop.formats.rounding import power_of_two_below
from scaleprop.ops import estimators
from scaleprop.ops.hadamard import hadamard

_FIXED_SIGNS = "+++-+------+-+--"


def random_bits(step: Tensor, stream: Tensor, shape: Sequence[Any], seed: int, bits: int,
                first_row: int) -> Tensor:
    """int32 [rows, columns], uniform on 0..2^bits-1, see ``formats.random``."""
    return random.random_bits(shape, seed, stream, step, bits, (first_row, 0), step.device)


def random_signs(step: Tensor, size: int, seed: int, stream: int) -> Tensor:
    """±1, float32 [size]."""
    return random.random_signs(size, seed, stream, step)


def fixed_signs(step: Tensor) -> Tensor:
    """±1, float32 [16], on step's device: the vector that TransformerEngine rotates NVFP4 with."""
    negative = sum(1 << place for place, sign in enumerate(_FIXED_SIGNS) if sign == "-")
    place = torch.arange(len(_FIXED_SIGNS), device=step.device)
    return 1.0 - 2.0 * ((negative >> place) & 1).to(torch.float32)


def rotate(x: Tensor, block: int, signs: Tensor | None, axis: int) -> Tensor:
    """``hadamard`` of x [R, C] in float32, zeros appended to ``axis`` up to whole blocks: products
    of two factors that are so rotated are the same."""
    missing = -x.shape[axis] % block
    wide = x.to(torch.float32)
    if isinstance(missing, torch.SymInt) or missing:
        widths: Any = (0, missing) if axis % 2 else (0, 0, 0, missing)
        wide = torch.nn.functional.pad(wide, widths)
    return hadamard(wide, block, signs, axis)


def unrotate(x: Tensor, block: int, signs: Tensor | None, axis: int, size: Any) -> Tensor:
    """The inverse of ``rotate``, of a matrix that had ``size`` along ``axis``."""
    return hadamard(x, block, signs, axis, transpose=True).narrow(axis, 0, size)


def softened(x: Tensor, estimator: str, format: str, axis: int) -> Tensor:
    """What is quantized in place of x, see ``estimators.forward``; float32."""
    return estimators.forward(estimator, x.to(torch.float32), format, axis)


def estimate(gradient: Tensor, x: Tensor, estimator: str, format: str, axis: int,
             tensor_amax: Tensor | None = None, headroom: float = 1.0,
             prescale: float = 1.0) -> Tensor:
    """The gradient of x, of that of what it was quantized to, see ``estimators.backward``."""
    return estimators.backward(estimator, gradient.to(torch.float32), x.to(torch.float32), format,
                               axis, None, tensor_amax, headroom, prescale).to(gradient.dtype)


def truncate(x: Tensor, element: str) -> Tensor:
    """x cut toward zero to a value of a signed float element, saturated, in x's dtype. NaN and Inf
    stay, for the loss to show them.

    As bits are cut off; computed in float32, in float64 for float64 data.
    """
    fmt = signed_float(element)
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    size = wide.abs()
    power = power_of_two_below(size).clamp(2.0**fmt.emin, 2.0**fmt.emax)
    step = power * 2.0**-fmt.fraction_bits
    cut = ((size / step).floor() * step).clamp(max=fmt.max)
    return torch.where(x.isfinite(), torch.copysign(cut, wide).to(x.dtype), x)


def signed_float(name: str) -> FloatElement:
    """A signed float element.

    Raises:
        FormatError: for other elements.
    """
    found = element_of(name)
    if not isinstance(found, FloatElement) or not found.signed:
        raise FormatError(f"{name!r} is no signed float element, as e5m7 is")
    return found


# what ``registration`` registers; each is its own kernel, on data and on fake tensors
SCHEMAS = {
    "random_bits": "(Tensor step, Tensor stream, SymInt[] shape, int seed, int bits, "
                   "SymInt first_row) -> Tensor",
    "random_signs": "(Tensor step, int size, int seed, int stream) -> Tensor",
    "fixed_signs": "(Tensor step) -> Tensor",
    "rotate": "(Tensor x, int block, Tensor? signs, int axis) -> Tensor",
    "unrotate": "(Tensor x, int block, Tensor? signs, int axis, SymInt size) -> Tensor",
    "softened": "(Tensor x, str estimator, str format, int axis) -> Tensor",
    "truncate": "(Tensor x, str element) -> Tensor",
    "estimate": "(Tensor gradient, Tensor x, str estimator, str format, int axis, "
                "Tensor? tensor_amax=None, float headroom=1.0, float prescale=1.0) -> Tensor",
}
KERNELS = {"random_bits": random_bits, "random_signs": random_signs,
           "fixed_signs": fixed_signs, "rotate": rotate, "unrotate": unrotate,
           "softened": softened, "estimate": estimate, "truncate": truncate}
