"""The Inductor backend: scaled programs as fused C++ kernels and oneDNN 8-bit linears.

Importing this package also teaches Inductor to fuse ``scaleprop::*`` under ``torch.compile``.
"""

from scaleprop.backends import loop_split
from scaleprop.backends.inductor.backend import InductorBackend, InductorExecutable
from scaleprop.backends.inductor.decompositions import register_decompositions

loop_split.install()
register_decompositions()

__all__ = ["InductorBackend", "InductorExecutable", "register_decompositions"]
