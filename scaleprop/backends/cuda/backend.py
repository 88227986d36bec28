"""The CUDA backend: what lowers a program onto the device, or says what is missing."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.backends.base import Backend
from scaleprop.backends.cuda.devices import LEAST, capability_of, support
from scaleprop.backends.cuda.dialect import dialect_for
from scaleprop.backends.cuda.products import interpreted
from scaleprop.backends.inductor import InductorExecutable
from scaleprop.errors import BackendUnavailable
from scaleprop.passes.base import Program


@dataclasses.dataclass(frozen=True)
class CudaBackend(Backend):
    """Triton kernels for quantized operators; TorchInductor for what is around them.

    Weights move to the current CUDA device; inputs are copied there where they are elsewhere, and
    results stay there. Where TRITON_INTERPRET=1, kernels are interpreted on the CPU: slow, and for
    checking alone.
    """

    name: ClassVar[str] = "cuda"

    def lower(self, program: Program) -> InductorExecutable:
        """Compile ``program``; takes seconds.

        Raises:
            BackendUnavailable: where torch sees no CUDA device, and nothing is interpreted; where
                the device is older than Triton's kernels.
            LoweringError: naming the node that has no lowering.
        """
        return InductorExecutable(program, dialect_for(_device()))


def _device() -> torch.device:
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        if capability_of(device) < LEAST:
            raise BackendUnavailable(
                f"backend 'cuda': {support(capability_of(device))[0].detail}. Use another device, "
                "or backend='inductor' or 'onnxruntime'.")
        return device
    if interpreted():
        return torch.device("cpu")
    why = ("this torch is built without CUDA" if torch.version.cuda is None
           else "torch finds no CUDA device")
    raise BackendUnavailable(
        f"backend 'cuda': {why} (torch {torch.__version__}). Install a CUDA build of torch "
        "on a machine with a device, or use backend='inductor' or 'onnxruntime'.")
