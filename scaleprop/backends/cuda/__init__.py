"""The CUDA backend: Triton kernels, and the library's products where there are."""

from scaleprop.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
