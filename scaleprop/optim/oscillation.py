"""Weights that jump between two values of the grid while they hardly move: found, and put to rest.

    oscillation = optim.Oscillation([layer.weight for layer in linears], "mxfp4")
    for batch in data:
        ...
        optimizer.step()
        oscillation.step()

Over ``every`` steps each weight sums up how far it moved, Σ|Δw|, and how far its quantized value
did, Σ|Δŵ|. Their ratio is about 1 for one that travels; one that swings around the boundary between
two values has a large one (TetraJet, Y. Chen et al., arXiv:2502.20853; resets by TetraJet-v2,
arXiv:2510.27527, above 16 or 4). What exceeds ``ratio`` is put into the middle of the interval that
rounds to its value, as far from both boundaries as can be.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import ConfigError
from scaleprop.formats.elements import CodebookElement, ElementFormat
from scaleprop.formats.grouping import Grouping
from scaleprop.formats.quantize import fake_quantize_tensor, representable
from scaleprop.formats.rounding import nearest
from scaleprop.formats.scaled import ScaledFormat, parse
from scaleprop.formats.scales import find_scales

TOWARD = ("centre", "ema")
_TORCH: Any = torch  # its foreach operators, public in all but name


class Oscillation:
    """Sums of one list of parameters; ``step()`` after each step of their optimizer.

    ``ratios``: Σ|Δŵ|/Σ|Δw| of each weight since the last reset, 0 where it did not move.
    ``shares``: of each parameter, which part of it the last reset changed (0 before the first).
    """

    def __init__(self, parameters: Iterable[Tensor], format: str | ScaledFormat, *, axis: int = -1,
                 ratio: float = 16.0, every: int = 200, toward: str = "centre",
                 decay: float = 0.998) -> None:
        """Watch ``parameters`` as quantized to ``format`` along ``axis``, to nearest.

        toward: which interval's middle: "centre", that of the weight's present value; "ema", of
            the two values around the weight, that which is nearer to the weight's average over
            1/(1-decay) steps (EMA-guided rounding, arXiv:2502.20853).

        Four float32 copies of the parameters are kept, five with "ema". Momenta are left alone.

        Raises:
            ConfigError: no parameters, some not plain or not floating, options out of range, a
                format with a zero point. FormatError: an unknown format.
        """
        self.parameters = list(parameters)
        self.format, self.axis = parse(format), axis
        self.ratio, self.every, self.toward, self.decay = ratio, every, toward, decay
        self._check()
        self.steps = 0
        self._grid, self._edges, self._centres = _tables(self.format.element)
        self._weights = [p.detach().to(torch.float32, copy=True) for p in self.parameters]
        self._values = self._quantized(self._weights)
        self._moved = [torch.zeros_like(w) for w in self._weights]
        self._jumped = [torch.zeros_like(w) for w in self._weights]
        self._averages = [w.clone() for w in self._weights] if toward == "ema" else []
        self.shares = [w.new_zeros(()) for w in self._weights]

    def _check(self) -> None:
        if not self.parameters or not all(p.is_floating_point() for p in self.parameters):
            raise ConfigError("Oscillation watches floating parameters: pass at least one, such as "
                              "the weights of linear layers")
        if any(type(p.detach()) is not Tensor for p in self.parameters):
            raise ConfigError("Oscillation takes plain tensors: blocks of sharded ones may be cut")
        if self.format.zero_point:
            raise ConfigError(f"format {str(self.format)!r} has a zero point: watch weights in a "
                              "symmetric one")
        if not (self.ratio > 0 and self.every >= 1 and 0 <= self.decay < 1):
            raise ConfigError(f"ratio={self.ratio}, every={self.every}, decay={self.decay}: ratio "
                              "is above 0, every at least 1, decay in [0, 1)")
        if self.toward not in TOWARD:
            raise ConfigError(f"unknown toward {self.toward!r}; known: {', '.join(TOWARD)}")

    @property
    def ratios(self) -> list[Tensor]:
        """Σ|Δŵ|/Σ|Δw| of each weight, float32, shaped as the parameters."""
        return [torch.where(moved > 0, jumped / moved, 0.0)
                for moved, jumped in zip(self._moved, self._jumped, strict=True)]

    @torch.no_grad()
    def step(self) -> None:
        """Count what the optimizer's step did; every ``every`` steps, reset what oscillates."""
        present = [p.detach().to(torch.float32) for p in self.parameters]
        values = self._quantized(present)
        for sums, new, old in ((self._moved, present, self._weights),
                               (self._jumped, values, self._values)):
            change = _TORCH._foreach_sub(new, old)
            _TORCH._foreach_abs_(change)
            _TORCH._foreach_add_(sums, change)
        _TORCH._foreach_copy_(self._weights, present)
        self._values = values
        if self._averages:
            _TORCH._foreach_lerp_(self._averages, present, 1.0 - self.decay)
        self.steps += 1
        if self.steps % self.every == 0:
            self._reset()

    def _reset(self) -> None:
        """Move what oscillates, and begin to count anew."""
        for index, (param, ratios) in enumerate(zip(self.parameters, self.ratios, strict=True)):
            swings = ratios > self.ratio
            rest = self._rest(index)
            param.copy_(torch.where(swings, rest.to(param.dtype), param))
            self.shares[index] = swings.to(torch.float32).mean() if swings.numel() else (
                self.shares[index])
        _TORCH._foreach_zero_(self._moved)
        _TORCH._foreach_zero_(self._jumped)
        present = [p.detach().to(torch.float32) for p in self.parameters]
        _TORCH._foreach_copy_(self._weights, present)
        self._values = self._quantized(present)

    def _quantized(self, weights: Sequence[Tensor]) -> list[Tensor]:
        return [fake_quantize_tensor(weight, self.format, self.axis) for weight in weights]

    def _rest(self, index: int) -> Tensor:
        """Middles of intervals, shaped as parameter number ``index``."""
        moved = self._weights[index].movedim(self.axis, -1)
        grouping = Grouping(self.format.granularity, tuple(moved.shape), self.axis)
        grouped = grouping.split(moved)
        scales = find_scales(grouped, self.format, grouping)
        item = self.format.element
        units = scales.normalize(grouped)
        grid, centres = self._grid.to(units.device), self._centres.to(units.device)
        if self._averages:
            average = grouping.split(self._averages[index].movedim(self.axis, -1))
            lower = torch.bucketize(units, grid[1:-1], right=True)
            units = scales.normalize(average).clamp(grid[lower], grid[lower + 1])
        value = nearest(units, item)
        centre = centres[torch.bucketize(value, self._edges.to(units.device))]
        return grouping.join(scales.restore(centre)).movedim(-1, self.axis)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``step`` reads but the parameters; not copied."""
        return {"steps": self.steps, "weights": self._weights, "values": self._values,
                "moved": self._moved, "jumped": self._jumped, "averages": self._averages,
                "shares": self.shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the one that was saved.

        Raises ``ConfigError`` where it watched other shapes, or had no averages and this one has.
        """
        for name in ("weights", "values", "moved", "jumped", "averages", "shares"):
            own, saved = getattr(self, f"_{name}", self.shares), state[name]
            shapes = [[list(x.shape) for x in tensors] for tensors in (own, saved)]
            if shapes[0] != shapes[1]:
                raise ConfigError(f"the loaded {name} have shapes {shapes[1]}, here {shapes[0]}: "
                                  "pass the same parameters and the same toward")
            for x, value in zip(own, saved, strict=True):
                x.copy_(value)
        self.steps = state["steps"]


def _tables(item: ElementFormat) -> tuple[Tensor, Tensor, Tensor]:
    """(values, ascending; edges that tell values apart; the middle of what rounds to each value).

    The intervals of the first and the last value have no end: their middle is the value.
    """
    grid = representable(item)
    between = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    rounding = [b for b, _ in item.boundaries] if isinstance(item, CodebookElement) else between
    middles = [(a + b) / 2 for a, b in itertools.pairwise(rounding)]
    centres = [grid[0], *middles, grid[-1]]
    assert all(math.isfinite(centre) for centre in centres)
    return tuple(torch.tensor(x, dtype=torch.float32) for x in (grid, between, centres))  # type: ignore[return-value]
