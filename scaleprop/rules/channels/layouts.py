"""Which channel lies where: layouts of tensors, and what movement makes of them.

A *layout* says of each position along some axes of a tensor which channel it belongs to. Elements
that differ along other axes only (batch, tokens, pixels) belong to the same channel. Movement of
elements moves channels: a view splits an axis into heads, an expansion repeats them, a slice takes
some. Both directions are needed, from input to output and back.

A channel is written as a *code*: ``2·channel``, or ``2·channel + 1`` where the position carries the
inverse transpose of the channel's transform (the other side of a contraction); −1 for a position
that is left as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.fx

Codes = npt.NDArray[np.int64]
UNTOUCHED = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Channels along ``axes`` (ascending, from the front) of a tensor.

    codes: one per position, shaped as the sizes of ``axes``.
    """

    axes: tuple[int, ...]
    codes: Codes

    @property
    def is_empty(self) -> bool:
        """Whether every position is left as it is."""
        return not bool((self.codes >= 0).any())

    def inverse(self) -> Layout:
        """The same channels, carrying the inverse transpose."""
        return Layout(self.axes, np.where(self.codes < 0, self.codes, self.codes ^ 1))

    def at(self, axes: Sequence[int]) -> Layout:
        """The same codes, whose axes are called ``axes``, in any order."""
        order = np.argsort(axes)
        return Layout(tuple(axes[place] for place in order), self.codes.transpose(order))

    def on(self, axes: Sequence[int], sizes: Sequence[int]) -> Codes:
        """The codes on all of ``axes`` (ascending, a superset of the layout's own), repeated along
        those that it does not distinguish."""
        index = tuple(slice(None) if axis in self.axes else None for axis in axes)
        return np.broadcast_to(self.codes[index], [sizes[axis] for axis in axes])

    def trimmed(self) -> Layout:
        """Without axes along which nothing changes, as long as one is left."""
        axes, codes = list(self.axes), self.codes
        for axis in reversed(range(len(axes))):
            if len(axes) > 1 and codes.size and bool((codes == codes.take([0], axis)).all()):
                codes = np.asarray(codes.take(0, axis))
                del axes[axis]
        return Layout(tuple(axes), codes)


class Refused(Exception):
    """A transform cannot pass an operator; says why."""


def sizes_of(node: Any) -> tuple[int, ...]:
    """The shape of a node's value, with a large prime for every size that may vary: products and
    quotients of sizes are then equal only where they always are."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return ()
    sizes: Any = value.shape
    return tuple(size if isinstance(size, int) else _stand_in(size.node.expr) for size in sizes)


@lru_cache(maxsize=4096)
def _stand_in(expression: Any) -> int:
    return int(expression.subs({symbol: _prime(str(symbol)) for symbol in expression.free_symbols}))


_PRIMES: dict[str, int] = {}


def _prime(symbol: str) -> int:
    if symbol not in _PRIMES:
        candidate = max(_PRIMES.values(), default=1_000_003) + 2
        while any(candidate % divisor == 0 for divisor in range(3, math.isqrt(candidate) + 1, 2)):
            candidate += 2
        _PRIMES[symbol] = candidate
    return _PRIMES[symbol]


def reshaped(layout: Layout, before: Sequence[int], after: Sequence[int]) -> Layout:
    """The layout of a view with sizes ``after`` of a tensor with sizes ``before``.

    Raises:
        Refused: where channels and something that may vary end up in one axis.
    """
    axes: list[int] = []
    shape: list[int] = []
    order: list[int] = []
    for inside, outside in _groups(before, after):
        mine = [axis for axis in inside if axis in layout.axes]
        if not mine:
            continue
        if len(inside) == len(outside) == 1:
            order += [inside[0]]
            axes += [outside[0]]
            shape += [after[outside[0]]]
            continue
        if math.prod(before[axis] for axis in inside) > _LIMIT:
            raise Refused("a view joins channels with an axis whose size may vary")
        order += inside
        axes += outside
        shape += [after[axis] for axis in outside]
    codes = layout.on(sorted(order), before).reshape(shape)
    return Layout(tuple(axes), codes).trimmed()


_LIMIT = 1_000_000  # stand-ins for sizes that may vary are larger


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes with equal products: [2, 3, 4] → [6, 4] has 2·3 = 6, and 4 = 4."""
    groups: list[tuple[list[int], list[int]]] = []
    left = right = 0
    while left < len(before) or right < len(after):
        inside, outside = [left] if left < len(before) else [], []
        product, other = (before[left] if inside else 1), 1
        left += len(inside)
        if right < len(after):
            outside, other = [right], after[right]
            right += 1
        while product != other:
            if product < other and left < len(before):
                product *= before[left]
                inside.append(left)
                left += 1
            elif right < len(after):
                other *= after[right]
                outside.append(right)
                right += 1
            else:
                raise Refused("the sizes of a view do not match")
        groups.append((inside, outside))
    return groups


def relabelled(layout: Layout, new_axis: dict[int, int]) -> Layout:
    """The layout where old axis ``a`` is called ``new_axis[a]``.

    Raises:
        Refused: where an axis of the layout has no new name.
    """
    missing = [axis for axis in layout.axes if axis not in new_axis]
    if missing:
        raise Refused(f"axis {missing[0]}, along which channels lie, does not survive")
    return layout.at([new_axis[axis] for axis in layout.axes])


def taken(layout: Layout, axis: int, index: Any) -> Layout:
    """The positions ``index`` (a slice or an array) of ``axis``."""
    if axis not in layout.axes:
        return layout
    place = layout.axes.index(axis)
    return Layout(layout.axes, layout.codes[(slice(None),) * place + (index,)])


def put(layout: Layout, axis: int, index: Any, size: int) -> Layout:
    """What was ``taken`` back in its place on an axis of ``size``; the rest is untouched."""
    if axis not in layout.axes:
        return layout
    place = layout.axes.index(axis)
    shape = list(layout.codes.shape)
    shape[place] = size
    codes = np.full(shape, UNTOUCHED, dtype=np.int64)
    codes[(slice(None),) * place + (index,)] = layout.codes
    return Layout(layout.axes, codes)


def block_rows(layout: Layout, block: int) -> Codes:
    """[n, block]: where, in the flattened layout, the channels of each block are.

    Raises:
        Refused: where a block is not whole, or not in its order.
    """
    flat = layout.codes.reshape(-1)
    places = np.flatnonzero(flat != UNTOUCHED)
    if len(places) % block:
        raise Refused("only some of the channels that are mixed are here")
    rows = places.reshape(-1, block)
    channel = flat[rows] >> 1
    in_order = bool((channel % block == np.arange(block)).all())
    adjacent = bool((np.diff(rows, axis=1) == 1).all())
    if not (in_order and adjacent and bool((channel // block == channel[:, :1] // block).all())):
        raise Refused("only some of the channels that are mixed are here, or in another order")
    return rows


def crosses(layout: Layout, block: int, axes: Sequence[int]) -> bool:
    """Whether some channels that are mixed differ in their position along ``axes``."""
    rows = block_rows(layout, block)
    places = np.unravel_index(rows, layout.codes.shape)
    return any(bool((place != place[:, :1]).any())
               for axis, place in zip(layout.axes, places, strict=True) if axis in axes)
