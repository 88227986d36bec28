"""Quantizers with learned parameters, as ordinary modules: for ``parametrize``, ``torch.compile``,
``torch.export`` and ``state_dict`` they are modules like any other.

    parametrize.register_parametrization(
        linear, "weight", LearnedStep(linear.weight, "int4[row]*f32"))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats import ScaledFormat, ScaledTensor, parse
from scaleprop.formats import quantize as quantize_tensor
from scaleprop.formats.elements import IntegerElement
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import check_input
from scaleprop.formats.rounding import Rounding, nearest
from scaleprop.formats.scales import Scales, affine_codes, given_scales


class LearnedStep(torch.nn.Module):
    """x → step·Q(x/step) with a learned step (LSQ; Esser et al., arXiv:1902.08153).

    With u = x/step, and Q rounding to the element's values from -Qn to Qp, saturated:
        ∂x̂/∂x = 1 where -Qn < u < Qp, else 0;
        ∂x̂/∂step = Q(u) - u where -Qn < u < Qp, else Q(u); times 1/√(N·Qp), N values a step.
    Steps begin at 2·mean|x|/√Qp (1 where all x are 0). The sign of the parameter means nothing.
    """

    def __init__(self, x: Tensor, format: str | ScaledFormat, axis: int = -1,
                 count: int | None = None) -> None:
        """A quantizer for tensors as ``x``, along ``axis``: a weight, or a sample of activations.

        format: any element with one float32 scale, which becomes the step (``int4[row]*f32``,
            ``e2m1[1x32]*f32``); with ``+zp`` the values are 0..2^bits-1, for what is not negative.
            Steps of activations are those of a tensor or of channels: rows are not always as many.
        count: N, where it is not the values of ``x`` that share a step: of activations, those of
            one sample.

        Raises:
            ConfigError: a format whose scale is no float32, x that is not floating or not finite.
            FormatError: an unknown format; an axis that x does not have.
        """
        super().__init__()
        self.format = parse(format)
        self.axis = axis
        if self.format.scale.name != "f32" or self.format.two_level:
            raise ConfigError(f"format {str(self.format)!r}: a learned step is one float32 scale; "
                              "use one as 'int4[row]*f32'")
        if not x.is_floating_point() or x.numel() == 0 or not bool(x.detach().isfinite().all()):
            raise ConfigError(f"LearnedStep begins with the mean size of x ({x.dtype} "
                              f"{list(x.shape)}): pass floating numbers, all finite")
        check_input(x, axis, Rounding("nearest"), None)
        grouped, grouping = self._grouped(x.detach())
        sizes = grouping.reduce(torch.sum, grouping.split(torch.ones_like(grouping.join(grouped))))
        mean = grouping.reduce(torch.sum, grouped.abs()) / sizes
        begin = torch.where(mean == 0, 1.0, mean * (2.0 / math.sqrt(self.largest)))
        self.step = torch.nn.Parameter(grouping.compact(begin).to(torch.float32))
        self.count = int(sizes.max()) if count is None else count
        if self.count < 1:
            raise ConfigError(f"count is {count}: how many values share a step, at least 1")

    @property
    def largest(self) -> float:
        """Qp."""
        item = self.format.element
        if self.format.zero_point:
            assert isinstance(item, IntegerElement)
            return float(item.levels)
        return item.max

    @property
    def scale(self) -> Tensor:
        """|step|, above 0, float32, shaped as the format's scales."""
        return self.step.abs() + torch.finfo(torch.float32).tiny

    def quantize(self, x: Tensor) -> ScaledTensor:
        """What ``forward`` computes, as codes and scales."""
        scale = self.scale.detach()
        parts = [scale, torch.zeros_like(scale)] if self.format.zero_point else [scale]
        return quantize_tensor(x.detach(), self.format, self.axis, scales=parts)

    def forward(self, x: Tensor) -> Tensor:
        """x̂ in the shape and dtype of ``x``."""
        grouped, grouping = self._grouped(x)
        scale = self.scale
        parts = [scale, torch.zeros_like(scale)] if self.format.zero_point else [scale]
        step = given_scales(parts, grouped, self.format, grouping).scale
        units = (grouped / step).detach()
        value = self._rounded(units)
        low = 0.0 if self.format.zero_point else self.format.element.min
        inside = (units > low) & (units < self.largest)
        slope = (value - torch.where(inside, units, 0.0)) * (
            1.0 / math.sqrt(self.count * self.largest))
        # has the gradients of the class's docstring, and is taken away again: x̂ stays exact
        learned = torch.where(inside, grouped, 0.0) + step * slope
        restored = value * step.detach() + (learned - learned.detach())
        return grouping.join(restored).to(x.dtype).movedim(-1, self.axis)

    def right_inverse(self, x: Tensor) -> Tensor:
        """What ``parametrize`` keeps when the parametrized tensor is assigned to: x itself."""
        return x

    def extra_repr(self) -> str:
        return f"{str(self.format)!r}, axis={self.axis}, count={self.count}"

    def _grouped(self, x: Tensor) -> tuple[Tensor, Grouping]:
        moved = (x if x.dtype == torch.float64 else x.to(torch.float32)).movedim(self.axis, -1)
        grouping = Grouping(self.format.granularity, tuple(moved.shape), self.axis)
        return grouping.split(moved), grouping

    def _rounded(self, units: Tensor) -> Tensor:
        if not self.format.zero_point:
            return nearest(units, self.format.element)
        one = torch.ones((), device=units.device)
        return affine_codes(units, Scales(one, zero_point=one * 0.0), self.format)
