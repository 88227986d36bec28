"""What a lowering costs: seconds of one thread, from a few measured rates.

Measured with onnxruntime 1.31.1 on one core of a Xeon with AMX (``benchmarks/ort_kernels.py``
reproduces the figures). They rank candidates; nothing else depends on them, and a machine with
other ratios gets a slower choice, never a wrong one. M is the number of rows in the example.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one core.

    float_bytes, byte_bytes: weight bytes/s that float32 and u8×s8 GEMMs read.
    float_macs, byte_macs: multiply-adds/s of the same.
    nbits_weights: 4-bit weights/s that MatMulNBits unpacks; nbits_macs: its multiply-adds/s.
    element: seconds of one elementwise pass per float32 element; node: seconds per ONNX node.
    """

    float_bytes: float = 17.6e9
    float_macs: float = 72e9
    byte_bytes: float = 21e9
    byte_macs: float = 850e9
    nbits_weights: float = 60e9
    nbits_macs: float = 90e9
    element: float = 0.25e-9
    node: float = 2e-6


RATES = Rates()


def float_gemm(m: int, k: int, n: int, rates: Rates = RATES) -> float:
    """Seconds of a float32 product [m, k] × [k, n]."""
    return max(4 * k * n / rates.float_bytes, m * k * n / rates.float_macs)


def byte_gemm(m: int, k: int, n: int, rates: Rates = RATES) -> float:
    """Seconds of a u8×s8 product: reading weights overlaps with multiplying."""
    return max(k * n / rates.byte_bytes, m * k * n / rates.byte_macs)


def nbits_gemm(m: int, k: int, n: int, rates: Rates = RATES) -> float:
    """Seconds of MatMulNBits with int8 activations (accuracy level 4)."""
    return k * n / rates.nbits_weights + m * k * n / rates.nbits_macs


def passes(count: float, elements: int, nodes: int = 0, rates: Rates = RATES) -> float:
    """Seconds of ``count`` elementwise passes over ``elements``, in ``nodes`` ONNX nodes."""
    return count * elements * rates.element + nodes * rates.node
