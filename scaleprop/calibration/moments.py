"""Streaming second moments of activations, in constant memory."""

from __future__ import annotations

import torch

_ROWS = 512  # rows gathered before they are multiplied: short batches would touch all K² for little


class SecondMoment:
    """Σ xᵀx over all rows seen of values [..., K]; K² float64 numbers and at most 512 rows.

    Rows are multiplied in float32, 512 at a time, and summed in float64.
    """

    def __init__(self, size: int) -> None:
        self._sum = torch.zeros(size, size, dtype=torch.float64)
        self._rows = torch.empty(_ROWS, size)
        self._filled = 0

    @property
    def size(self) -> int:
        """K."""
        return self._sum.shape[0]

    def add(self, x: torch.Tensor) -> None:
        """Count every row of ``x`` [..., K]."""
        rows = x.detach().reshape(-1, self.size).to("cpu", torch.float32)
        while rows.shape[0]:
            taken = rows[: _ROWS - self._filled]
            self._rows[self._filled : self._filled + taken.shape[0]] = taken
            self._filled += taken.shape[0]
            rows = rows[taken.shape[0] :]
            if self._filled == _ROWS:
                self._flush()

    def total(self) -> torch.Tensor:
        """Σ xᵀx so far, [K, K] float64."""
        self._flush()
        return self._sum.clone()

    def _flush(self) -> None:
        rows = self._rows[: self._filled]
        self._sum += rows.t() @ rows
        self._filled = 0
