"""The one primitive of unit scaling: a constant on the way forward, another on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import UnsupportedOpError


class _ScaleFwdBwd(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, forward: float, backward: float) -> Tensor:
        # a result of its own: autograd would take x itself for one that was written to
        return x * forward if forward != 1.0 else x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.forward, ctx.backward = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return gradient * ctx.backward if ctx.backward != 1.0 else gradient, None, None


class _InEager(_ScaleFwdBwd):
    """With what compilers have no support for, and need not: they take derivatives once."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return tangents[0] * ctx.forward

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.backward != ctx.forward:
            gradient: Any = _DerivedOnce.apply(gradient)
        return _ScaleFwdBwd.backward(ctx, gradient)


class _DerivedOnce(torch.autograd.Function):
    """The gradients of a gradient would be multiplied too, each path by another constant."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise UnsupportedOpError(
            "a gradient of a gradient goes through a unit-scaled model: multipliers that leave the "
            "first true leave the second wrong. Remedy: compute what is differentiated twice, as "
            "gradient penalties are, with the model that unit_scale was given.")


def scale_fwd_bwd(x: Tensor, forward: float, backward: float) -> Tensor:
    """``forward``·x, whose gradient is multiplied by ``backward`` (not by ``forward``).

    Not the gradient of what it computes, unless both are equal: the caller answers for every path
    between two values having the same product of ``backward``/``forward`` (Blake et al., Unit
    Scaling, 2023, section 4). x: any shape, a floating dtype, kept. A function, not an operator
    of a library, so that compilers see two multiplications. Derivatives forward and under ``vmap``
    are those of what it computes; second ones backward raise ``UnsupportedOpError``.
    """
    kind = _ScaleFwdBwd if torch.compiler.is_compiling() else _InEager
    return kind.apply(x, forward, backward)  # type: ignore[no-any-return]
