"""Where passes leave tensors that memory has no room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch


class Shelf(Protocol):
    """Tensors outside memory; each is read when it is computed with."""

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values outside memory; a small tensor as it is."""
        ...

    def keep(
        self, source: torch.Tensor, how: str, parts: Sequence[torch.Tensor],
        facts: Mapping[str, float],
    ) -> list[torch.Tensor]:
        """``parts``, which ``source`` became by ``how``, outside memory, and known by that."""
        ...

    def find(
        self, source: torch.Tensor, how: str
    ) -> tuple[list[torch.Tensor], dict[str, float]] | None:
        """What ``keep`` was given for ``source`` and ``how``, by an interrupted run as well."""
        ...
