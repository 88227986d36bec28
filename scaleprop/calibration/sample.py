"""A bounded uniform sample of rows, drawn while they stream by."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class RowSample:
    """At most ``size`` of all rows seen, each as likely as any other.

    Every row draws a key in [0, 1); those with the smallest keys stay, in the order of the keys.
    So two samples merge into what one sample of all rows would be, whatever came first.

    rows: [n, K] float32 on the CPU. keys: [n] float64, ascending.
    """

    size: int
    rows: torch.Tensor
    keys: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, size: int, generator: torch.Generator) -> RowSample:
        """A sample of ``rows`` [n, K]; ``generator`` is a CPU one and draws one number a row."""
        keys = torch.rand(rows.shape[0], dtype=torch.float64, generator=generator)
        kept, index = keys.topk(min(size, keys.numel()), largest=False, sorted=True)
        return cls(size, rows[index.to(rows.device)].to("cpu", torch.float32), kept)

    def merge(self, other: RowSample) -> RowSample:
        """A sample of all rows that either has seen, as small as the smaller one allows.

        Raises:
            ValueError: where the rows differ in length.
        """
        if self.rows.shape[1] != other.rows.shape[1]:
            raise ValueError(f"rows of {self.rows.shape[1]} and of {other.rows.shape[1]} values "
                             "have no common sample")
        size = min(self.size, other.size)
        keys = torch.cat([self.keys, other.keys])
        kept, index = keys.topk(min(size, keys.numel()), largest=False, sorted=True)
        if bool((index < self.keys.numel()).all()):  # the usual case late in a long stream
            return RowSample(size, self.rows[index], kept)
        return RowSample(size, torch.cat([self.rows, other.rows])[index], kept)
