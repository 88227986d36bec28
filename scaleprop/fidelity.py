"""How far a lowered program may be from the reference, end to end, and how far it is.

A low-precision graph is discontinuous: where float32 sums differ in their last bit, an
activation may round to the neighbouring code, an extreme may move a whole tensor's scale, and from
there on rounding errors are independent. Two right programs then differ by √2 of what the format
itself costs, and no end-to-end bound can be tighter: with r the reference's outputs, b the
unquantized model's and a the lowered program's, ``‖a − r‖ ≤ max(SLACK · ‖r − b‖, FLOOR · ‖r‖)``.
Backends hold single nodes to much tighter bounds, given the same inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from scaleprop.errors import MismatchError

SLACK = 2.0  # times the format's own error; √2 for independent rounding
FLOOR = 1e-4  # float32 summation order, through a deep model


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Relative errors ‖·‖₂ of the worst output.

    lowering_error: backend against reference. format_error: reference against the unquantized
    model. cosine: backend against the unquantized model.
    """

    lowering_error: float
    format_error: float
    cosine: float

    def __str__(self) -> str:
        return (f"lowering error {self.lowering_error:.2e} of the reference, "
                f"format error {self.format_error:.2e}, cosine to the model {self.cosine:.5f}")


def compare(
    actual: Sequence[Any], reference: Sequence[Any], baseline: Sequence[Any], where: str
) -> Fidelity:
    """Hold ``actual`` to the bound above, output by output.

    Integer outputs (token ids, indices) must have the shape and dtype of the reference's, but are
    not held to the bound: one code's difference may choose another index. They are measured.

    Raises:
        MismatchError: naming the output, its error and the bound.
    """
    worst = Fidelity(0.0, 0.0, 1.0)
    for index, (got, want, plain) in enumerate(zip(actual, reference, baseline, strict=True)):
        if not isinstance(want, torch.Tensor):
            if got != want:
                raise MismatchError(f"{where}: output {index} is {got!r}, reference {want!r}")
            continue
        found = _compare_tensors(got, want, plain, f"{where}: output {index}")
        worst = Fidelity(max(worst.lowering_error, found.lowering_error),
                         max(worst.format_error, found.format_error),
                         min(worst.cosine, found.cosine))
    return worst


def _compare_tensors(
    got: torch.Tensor, want: torch.Tensor, plain: torch.Tensor, where: str
) -> Fidelity:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise MismatchError(f"{where} is {got.dtype} {tuple(got.shape)}, "
                            f"reference {want.dtype} {tuple(want.shape)}")
    _check_infinities(got, want, where)
    a, r, b = (_finite(t, want) for t in (got, want, plain))
    lowering, scheme = _relative(a, r), _relative(r, b)
    bound = max(SLACK * scheme, FLOOR)
    if want.is_floating_point() and not lowering <= bound:
        raise MismatchError(
            f"{where} differs from the reference by {lowering:.3g} (relative 2-norm), more than "
            f"the bound {bound:.3g}; the format's own error is {scheme:.3g}"
        )
    return Fidelity(lowering, scheme, _cosine(a, b))


def _check_infinities(got: torch.Tensor, want: torch.Tensor, where: str) -> None:
    outside = ~want.isfinite()
    if not torch.equal(got[outside].isnan(), want[outside].isnan()) or not torch.equal(
        got[outside].nan_to_num(0.0), want[outside].nan_to_num(0.0)
    ):
        raise MismatchError(f"{where}: NaN and infinities are not where the reference has them")


def _finite(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Flat float64 values where the reference is finite; masks of −inf stay out of the norms."""
    keep = like.isfinite() if like.is_floating_point() else torch.ones_like(like, dtype=torch.bool)
    return tensor[keep].double()


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    tiny = torch.finfo(torch.float64).tiny
    return float((a - b).norm() / b.norm().clamp_min(tiny)) if a.numel() else 0.0


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    norms = a.norm() * b.norm()
    return float((a @ b) / norms) if norms > 0 else 1.0
