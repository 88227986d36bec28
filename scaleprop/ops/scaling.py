"""The one primitive of unit scaling: a constant on the way forward, another on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ScaleFwdBwd(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, forward: float, backward: float) -> Tensor:
        # a result of its own: autograd would take x itself for one that was written to
        return x * forward if forward != 1.0 else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backward = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient * ctx.backward if ctx.backward != 1.0 else gradient, None, None


def scale_fwd_bwd(x: Tensor, forward: float, backward: float) -> Tensor:
    """``forward``·x, whose gradient is multiplied by ``backward`` (not by ``forward``).

    Not the gradient of what it computes, unless both are equal: the caller answers for every path
    between two values having the same product of ``backward``/``forward`` (Blake et al., Unit
    Scaling, 2023, section 4). x: any shape, a floating dtype, kept. A function, not an operator
    of a library, so that compilers see two multiplications.
    """
    return _ScaleFwdBwd.apply(x, forward, backward)  # type: ignore[no-any-return]
