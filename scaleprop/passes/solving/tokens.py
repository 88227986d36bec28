"""How much each token counts in a second moment: H = Σ_t r_t x_t x_tᵀ (RSQ, arXiv:2503.01820).

    attention   r from Σ_heads Σ_queries P[head, query, t]: how much attention token t receives
    norm        r from ‖x_t‖₂, the size of what the layer reads
    first-n     r_max for the first tokens of each sequence, r_min for the others
    uniform     1

Scores are brought linearly to [r_min, r_max] in each sequence, then divided by their mean, as in
the authors' code: sequences weigh alike whatever their scores. Only r_min/r_max matters.
"""

from __future__ import annotations

from typing import Literal

import torch

Strategy = Literal["uniform", "attention", "norm", "first-n"]


def scaled_scores(scores: torch.Tensor, r_min: float, r_max: float) -> torch.Tensor:
    """Scores [..., T] → weights with mean 1 per sequence. Equal scores: all 1."""
    wide = scores.double()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    span = high - low
    share = torch.where(span > 0, (wide - low) / span, 1.0)
    weights = r_min + share * (r_max - r_min)
    return weights / weights.mean(-1, keepdim=True)


def norm_scores(x: torch.Tensor) -> torch.Tensor:
    """‖x_t‖₂ of x [..., T, K]."""
    return x.double().norm(dim=-1)


def first_scores(x: torch.Tensor, count: int) -> torch.Tensor:
    """1 for the first ``count`` tokens of x [..., T, K], 0 for the others."""
    first = torch.arange(x.shape[-2], device=x.device) < count
    return first.double().expand(x.shape[:-1])
