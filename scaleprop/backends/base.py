"""What a backend is: it turns a program into something that runs flat tensors."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from scaleprop.passes.base import Program


class Executable(abc.ABC):
    """A lowered program. Takes and returns flat leaves, in pytree order; the face does pytrees."""

    @abc.abstractmethod
    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Run on the flattened inputs; inputs are never written to.

        Returns the flattened outputs (non-tensor leaves as captured).
        """

    @property
    def lowerings(self) -> Mapping[str, str]:
        """Graph node name → what runs for it, e.g. ``MatMulIntegerToFloat u8×s8``."""
        return {}


class Backend(abc.ABC):
    """Lowers ``scaleprop::*`` operators and ATen; never changes what they mean."""

    name: ClassVar[str]

    @abc.abstractmethod
    def lower(self, program: Program) -> Executable:
        """Make ``program`` run.

        Raises:
            LoweringError, UnsupportedOpError: naming node, operator, source line and remedy.
            BackendUnavailable: where a package or device is missing.
        """

    def verify(self, program: Program) -> None:  # noqa: B027  most have no bounds of their own
        """Hold what ``lower`` makes of ``program`` to this backend's own bounds, where it has any
        that are tighter than the end-to-end bound of ``scaleprop.fidelity``.

        Raises:
            MismatchError: naming the node.
        """
