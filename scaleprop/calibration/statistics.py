"""Streaming statistics of one tensor over calibration batches, in constant memory."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """What calibration saw of one graph value."""
