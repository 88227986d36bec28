"""What devices do natively, what is computed exactly in other units, and what they cannot do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import torch

How = Literal["native", "exact", "refused"]
Capability = tuple[int, int]
LEAST: Capability = (8, 0)
FLOAT8: Capability = (8, 9)  # from which on there are units for it
FLOAT8_BLOCKS: Capability = (9, 0)  # which alone the library has products for
BLOCK_SCALES: Capability = (10, 0)
TENSOR_MEMORY = (10, 11)  # major: units that keep sums in a memory of their own
KNOWN: Mapping[Capability, str] = {
    (8, 0): "A100", (8, 9): "L4, L40, RTX 40", (9, 0): "H100, H200", (10, 0): "B200",
    (12, 0): "RTX 50, RTX PRO 6000"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Support:
    """What becomes of an operation on a device. exact: the same numbers, in wider units."""

    operation: str
    how: How
    detail: str


def _always(detail: str) -> Callable[[Capability], tuple[How, str]]:
    return lambda capability: ("native", detail)


def _from(least: Capability, native: str, other: str) -> Callable[[Capability], tuple[How, str]]:
    return lambda capability: ("native", native) if capability >= least else ("exact", other)


def has_block_units(capability: Capability, mixed: bool) -> bool:
    """Whether Triton multiplies MX blocks, of 32 with E8M0 scales, in a device's own units:
    ``tcgen05.mma`` takes any two of E2M1, E4M3 and E5M2, 12.x's ``mma.sync`` what is not ``mixed``,
    of one width. Other pairs Triton decodes, as the product kernel does."""
    return capability[0] in TENSOR_MEMORY or (capability[0] == 12 and not mixed)


def _in_a_kernel(mixed: bool) -> Callable[[Capability], tuple[How, str]]:
    return lambda capability: (
        ("native", "a kernel, block scales in hardware") if has_block_units(capability, mixed)
        else ("exact", _BFLOAT16))


_BFLOAT16 = "decoded in registers, multiplied as bfloat16, summed in float32"
_IN_HARDWARE = "library, block scales in hardware"
_OPERATIONS: Mapping[str, Callable[[Capability], tuple[How, str]]] = {
    "quantize, dequantize": _always("bit for bit, any format"),
    "stochastic rounding": _always("Philox, the reference's stream"),
    "INT8 × INT8": _always("sums in int32"),
    "INT8 × INT4": _always("INT4 widened in registers, sums in int32"),
    "FP8 × FP8": _from(FLOAT8, "library, or a kernel in float8", _BFLOAT16),
    "MXFP8 × MXFP8": _from(BLOCK_SCALES, _IN_HARDWARE, _BFLOAT16),
    "NVFP4 × NVFP4": _from(BLOCK_SCALES, _IN_HARDWARE, _BFLOAT16),
    "MXFP4 × MXFP4": _in_a_kernel(mixed=False),
    "MXFP4 × MXFP8": _in_a_kernel(mixed=True),
    "MXFP6, other mixed formats": lambda capability: ("exact", _BFLOAT16),
    "weights alone: INT4, MXFP4, NVFP4, FP8": lambda capability: ("exact", _BFLOAT16),
    "INT4 × FP8": lambda capability: ("exact", _BFLOAT16),
    "attention over a quantized cache": lambda capability: ("exact", _BFLOAT16),
}


def support(capability: Capability) -> tuple[Support, ...]:
    """Every operation on a device of this compute capability."""
    if capability < LEAST:
        why = f"compute capability {capability[0]}.{capability[1]}; Triton's kernels need 8.0"
        return tuple(Support(name, "refused", why) for name in _OPERATIONS)
    return tuple(Support(name, *rule(capability)) for name, rule in _OPERATIONS.items())


def capability_of(device: torch.device) -> Capability:
    """A CUDA device's; (0, 0) of others, which only interpret."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
