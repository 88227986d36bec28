"""Which elements share a scale, as views: split a tensor into groups, and join it again.

Everything here is on tensors whose quantized axis has been moved last. Sizes may be symbolic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scaleprop.errors import FormatError
from scaleprop.formats.scaled import Granularity


@dataclasses.dataclass(frozen=True)
class Grouping:
    """A granularity applied to a shape (quantized axis last; ints or SymInts).

    ``split`` gives the grouped view, in which ``dims`` are the axes that share a scale:
    block: [..., nb, b]; tile: [..., nr, r, nc, c]; the others: the tensor as it is.
    axis: where the quantized axis was before it was moved: how the tensor lies in memory.
    """

    granularity: Granularity
    shape: Sequence[Any]
    axis: int = -1

    def __post_init__(self) -> None:
        if self.granularity.kind == "tile" and len(self.shape) < 2:
            raise FormatError(f"[{self.granularity}] blocks need two axes, not shape "
                              f"{list(self.shape)}: use 1-D blocks, such as [1x32]")

    @property
    def counts(self) -> tuple[Any, Any]:
        """(rows of tiles, blocks along the last axis)."""
        g = self.granularity
        rows = self.shape[-2] if len(self.shape) > 1 else 1
        return -(-rows // g.rows), -(-self.shape[-1] // g.columns)

    @property
    def padded(self) -> Any:
        """Length of the last axis in storage: whole blocks."""
        if self.granularity.kind in ("block", "tile"):
            return self.counts[1] * self.granularity.columns
        return self.shape[-1]

    @property
    def whole(self) -> bool:
        """Whether the tensor is known to need no padding."""
        g = self.granularity
        if g.kind not in ("block", "tile"):
            return True
        rows, columns = self.counts
        right = columns * g.columns - self.shape[-1]
        return is_zero(right) and (g.kind == "block" or is_zero(rows * g.rows - self.shape[-2]))

    @property
    def scale_shape(self) -> tuple[Any, ...]:
        """Shape of the stored scales."""
        match self.granularity.kind:
            case "tensor":
                return ()
            case "row":
                return (*self.shape[:-1], 1)
            case "channel":
                return (self.shape[-1],)
            case "block":
                return (*self.shape[:-1], self.counts[1])
            case "tile":
                return (*self.shape[:-2], *self.counts)

    @property
    def dims(self) -> tuple[int, ...]:
        """Axes of the grouped view that share a scale."""
        match self.granularity.kind:
            case "tensor":
                return tuple(range(len(self.shape)))
            case "row" | "block":
                return (-1,)
            case "channel":
                return tuple(range(len(self.shape) - 1))
            case "tile":
                return (-3, -1)

    def split(self, x: Tensor) -> Tensor:
        """The grouped view of ``x``, padded with zeros to whole blocks."""
        g = self.granularity
        if g.kind not in ("block", "tile"):
            return x
        rows, columns = self.counts
        right = columns * g.columns - x.shape[-1]
        down = rows * g.rows - x.shape[-2] if g.kind == "tile" else 0
        if not (is_zero(right) and is_zero(down)):
            x = torch.constant_pad_nd(x, [0, right, 0, down] if g.kind == "tile" else [0, right])
        if g.kind == "block":
            return x.reshape(*self.shape[:-1], columns, g.columns)
        return x.reshape(*self.shape[:-2], rows, g.rows, columns, g.columns)

    def join(self, grouped: Tensor, *, keep_padding: bool = False) -> Tensor:
        """The inverse of ``split``; ``keep_padding`` keeps the last axis' zeros, for storage."""
        g = self.granularity
        if g.kind not in ("block", "tile"):
            return grouped
        rows, columns = self.counts
        if g.kind == "block":
            x = grouped.reshape(*self.shape[:-1], columns * g.columns)
        else:
            x = grouped.reshape(*self.shape[:-2], rows * g.rows, columns * g.columns)
            if not is_zero(rows * g.rows - self.shape[-2]):
                x = x[..., : self.shape[-2], :]
        if keep_padding or is_zero(columns * g.columns - self.shape[-1]):
            return x
        return x[..., : self.shape[-1]]

    def spread(self, scale: Tensor) -> Tensor:
        """Stored scales as a view that broadcasts against the grouped view."""
        match self.granularity.kind:
            case "block":
                return scale.unsqueeze(-1)
            case "tile":
                return scale.unsqueeze(-2).unsqueeze(-1)
            case _:
                return scale

    def compact(self, scale: Tensor) -> Tensor:
        """The inverse of ``spread``."""
        return scale.reshape(self.scale_shape)

    def stored(self, scale: Tensor) -> Tensor:
        """``scale``, as ``spread`` gives it, as a buffer that lies in memory as the tensor does.

        Inductor would fuse the ~20 operations that scales take into the loop over elements and
        repeat them there (NVFP4: 8.0× the time of a copy instead of 3.1×); it does not fuse through
        ``as_strided``. Laid out otherwise, scales would be gathered one by one."""
        if self.granularity.kind in ("tensor", "channel"):
            buffer = scale.contiguous()
            return buffer.as_strided(buffer.shape, buffer.stride())
        buffer = self.compact(scale).movedim(-1, self.axis).contiguous()
        return self.spread(buffer.as_strided(buffer.shape, buffer.stride()).movedim(self.axis, -1))

    def reduce(self, function: Callable[..., Tensor], grouped: Tensor) -> Tensor:
        """``function(grouped, dim, keepdim)`` over each group, broadcastable; 0 for empty ones."""
        dims = self.dims
        if not dims:
            return grouped  # one element a group, and amax, sum and so on of it is itself
        if any(is_zero(grouped.shape[dim]) for dim in dims):
            return grouped.new_zeros([1 if index - grouped.ndim in dims or index in dims else size
                                      for index, size in enumerate(grouped.shape)])
        return function(grouped, dims, True)


def is_zero(size: Any) -> bool:
    """Whether a size is 0; a symbolic one is not (sizes 0 and 1 are never symbolic)."""
    return isinstance(size, int) and size == 0


def static_shape(shape: Sequence[Any]) -> str:
    """A shape for messages."""
    return "×".join(str(size) for size in shape) or "scalar"
