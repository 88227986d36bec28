"""The CUDA backend: refuses, and says why, until its kernels exist."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from scaleprop.backends.base import Backend, Executable
from scaleprop.errors import BackendUnavailable, LoweringError
from scaleprop.passes.base import Program


@dataclasses.dataclass(frozen=True)
class CudaBackend(Backend):
    """Looks for a device and reports what is missing."""

    name: ClassVar[str] = "cuda"

    def lower(self, program: Program) -> Executable:
        """Never returns.

        Raises:
            BackendUnavailable: where torch sees no CUDA device.
            LoweringError: where it does.
        """
        del program
        if not torch.cuda.is_available():
            why = ("this torch is built without CUDA" if torch.version.cuda is None
                   else "torch finds no CUDA device")
            raise BackendUnavailable(
                f"backend 'cuda': {why} (torch {torch.__version__}). Install a CUDA build of torch "
                "on a machine with a device, or use backend='inductor' or 'onnxruntime'."
            )
        raise LoweringError(
            f"backend 'cuda': found {torch.cuda.get_device_name()}, but this version of scaleprop "
            "has no CUDA kernels. Use backend='inductor' or 'onnxruntime'."
        )
