"""What no parameter absorbs becomes operators: a product, a sum, a selection, a rotation.

They stay in high precision, are ordinary ATen operators (``scaleprop::hadamard`` where a rotation
has that form), and so lower to every backend.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop import ops
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.transforms.region import Region, writers
from scaleprop.passes.transforms.transform import (
    Centre,
    GivensRounds,
    Permute,
    Rotate,
    Scale,
    Shift,
    Transform,
)
from scaleprop.rules.channels import Layout, block_rows, sizes_of

aten: Any = torch.ops.aten

Node = torch.fx.Node

_ROUND = 24  # a round of pairs takes as long as a product with so many channels, as measured


def emit(
    rewriter: Rewriter,
    value: Node,
    layout: Layout,
    transform: Transform,
    region: Region,
    *,
    inverse: bool,
    why: str,
) -> Node:
    """A node that computes the transform of ``value``, or undoes it, right after it is made."""
    work = _Emission(rewriter, value, layout, region, why)
    if isinstance(transform, (Scale, Shift)):
        return work.each(transform, inverse)
    new = work.centred() if isinstance(transform, Centre) else work.mixed(transform, inverse)
    if new.meta["val"].is_contiguous():
        return new
    return work.contiguous(new)


class _Emission:
    def __init__(
        self, rewriter: Rewriter, value: Node, layout: Layout, region: Region, why: str
    ) -> None:
        self.rewriter = rewriter
        self.value = value
        self.layout = layout
        self.region = region
        self.why = why
        self.at = max([value, *writers(value)]).next
        while self.at.op == "placeholder":
            self.at = self.at.next

    def call(self, op: Any, *args: Any) -> Node:
        return self.rewriter.call(op, args, at=self.at, why=self.why)

    def contiguous(self, new: Node) -> Node:
        """What reads the value may view it as it was in memory."""
        return self.rewriter.call(aten.clone.default, (new,), at=self.at, why=self.why,
                                  kwargs={"memory_format": torch.contiguous_format})

    def constant(self, tensor: Tensor, name: str) -> Node:
        return self.rewriter.constant(tensor, f"{self.value.name}_{name}", at=self.at, why=self.why)

    def each(self, transform: Scale | Shift, inverse: bool) -> Node:
        codes = torch.from_numpy(self.layout.codes)
        channel = codes.clamp_min(0) >> 1
        rank = len(sizes_of(self.value))
        first = self.layout.axes[0]
        shape = [1] * (rank - first)
        for axis, size in zip(self.layout.axes, codes.shape, strict=True):
            shape[axis - first] = size
        dtype = self.value.meta["val"].dtype
        if isinstance(transform, Shift):
            shift = torch.where(codes < 0, 0.0, transform.values[channel]).reshape(shape)
            op = aten.add.Tensor if inverse else aten.sub.Tensor
            return self.call(op, self.value, self.constant(shift.to(dtype), "shift"))
        turned = (codes % 2 == 1) != inverse
        factor = torch.where(turned, transform.other[channel], transform.values[channel])
        factor = torch.where(codes < 0, 1.0, factor).reshape(shape)
        return self.call(aten.mul.Tensor, self.value, self.constant(factor.to(dtype), "scale"))

    def centred(self) -> Node:
        mean = self.call(aten.mean.dim, self.value, list(self.layout.axes), True)
        return self.call(aten.sub.Tensor, self.value, mean)

    def mixed(self, transform: Permute | Rotate, inverse: bool) -> Node:
        rank = len(sizes_of(self.value))
        axes, codes = self.layout.axes, self.layout.codes
        is_whole = bool((codes >= 0).all())
        shared = (isinstance(transform, Permute) and transform.order.ndim == 1) or (
            isinstance(transform, Rotate) and transform.is_shared)  # fmt: skip
        if is_whole and shared and codes.shape[-1] % self.region.block == 0:
            axes = axes[-1:]  # every row of the last axis holds whole blocks, all treated alike
        if isinstance(transform, Rotate) and transform.hadamard and len(axes) == 1 and is_whole:
            return self._hadamard(transform, axes[0], inverse)
        if isinstance(transform, Permute) and len(axes) == 1:
            order = self._order(transform.inverse() if inverse else transform, axes[0])
            return self.call(aten.index_select.default, self.value, axes[0],
                             self.constant(order, "order"))  # fmt: skip
        if isinstance(transform, Rotate) and self._in_order(axes):
            if transform.givens and len(transform.givens.partner) * _ROUND < transform.block:
                return self._rounds(transform.givens.inverse() if inverse else transform.givens)
            if transform.block < int(codes.shape[-1]):
                return self._blocks(transform.matrix.mT if inverse else transform.matrix)
        others = [axis for axis in range(rank) if axis not in axes]
        turn = [*others, *axes]
        moves = turn != list(range(rank))
        x = self.call(aten.permute.default, self.value, turn) if moves else self.value
        shape = self._shape(turn, len(others))
        matrix = self._matrix(transform, axes)
        if inverse:
            matrix = matrix.mT
        flat = self.call(aten.reshape.default, x, [*shape[: len(others)], matrix.shape[0]]) if (
            len(axes) > 1) else x  # fmt: skip
        dtype = self.value.meta["val"].dtype
        mixed = self.call(aten.matmul.default, flat,
                          self.constant(matrix.to(dtype).contiguous(), "rotation"))
        back = self.call(aten.reshape.default, mixed, shape) if len(axes) > 1 else mixed
        if not moves:
            return back
        return self.call(aten.permute.default, back, [turn.index(axis) for axis in range(rank)])

    def _in_order(self, axes: tuple[int, ...]) -> bool:
        """Whether the last axis holds all channels, one after the other."""
        codes = torch.from_numpy(self.layout.codes)
        return (axes == (len(sizes_of(self.value)) - 1,) and codes.ndim == 1
                and bool((codes == 2 * torch.arange(codes.numel())).all()))  # fmt: skip

    def _rounds(self, givens: GivensRounds) -> Node:
        """v·cos + v[partner]·sin, round by round."""
        x, dtype = self.value, self.value.meta["val"].dtype
        for partner, angle in zip(givens.partner, givens.angle.double(), strict=True):
            other = self.call(aten.index_select.default, x, -1, self.constant(partner, "partner"))
            cos = self.constant(angle.cos().to(dtype), "cos")
            sin = self.constant(angle.sin().to(dtype), "sin")
            x = self.call(aten.add.Tensor, self.call(aten.mul.Tensor, x, cos),
                          self.call(aten.mul.Tensor, other, sin))  # fmt: skip
        return x

    def _blocks(self, matrix: Tensor) -> Node:
        """Each block of the last axis times its own matrix, or all times the same."""
        n = matrix.shape[-1]
        rank = len(sizes_of(self.value))
        shape = self._shape(list(range(rank)), rank - 1)
        rotation = self.constant(matrix.to(self.value.meta["val"].dtype).contiguous(), "rotation")
        lead = shape[:-1] if matrix.ndim == 2 else [-1]
        split = self.call(aten.reshape.default, self.value, [*lead, shape[-1] // n, n])
        if matrix.ndim == 2:
            mixed = self.call(aten.matmul.default, split, rotation)
        else:
            product = self.call(aten.bmm.default, self.call(aten.permute.default, split, [1, 0, 2]),
                                rotation)
            mixed = self.call(aten.permute.default, product, [1, 0, 2])
        return self.call(aten.reshape.default, mixed, shape)

    def _shape(self, turn: list[int], count: int) -> list[Any]:
        """Sizes in the order ``turn``; nodes for those that may vary."""
        sizes: list[Any] = []
        for place, axis in enumerate(turn):
            size = self.value.meta["val"].shape[axis]
            fixed = isinstance(size, int) or place >= count
            sizes.append(size if fixed else self.call(aten.sym_size.int, self.value, axis))
        return sizes

    def _hadamard(self, transform: Rotate, axis: int, inverse: bool) -> Node:
        assert transform.hadamard is not None
        block, signs = transform.hadamard
        size = int(self.value.meta["val"].shape[axis])
        node = None
        if signs is not None:
            repeated = signs.repeat(size // signs.numel()).to(self.value.meta["val"].dtype)
            node = self.constant(repeated, "signs")
        return self.call(ops.hadamard, self.value, block, node, axis, inverse)

    def _rows(self, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Where each block lies on the flattened ``axes``, [m, n]; which block it is, [m]."""
        codes = self.layout.codes
        codes = codes[(0,) * (codes.ndim - len(axes))]
        part = Layout(axes, codes)
        rows = block_rows(part, self.region.block)
        blocks = (codes.reshape(-1)[rows[:, 0]] >> 1) // self.region.block
        return torch.from_numpy(rows), torch.from_numpy(blocks)

    def _order(self, transform: Permute, axis: int) -> Tensor:
        rows, blocks = self._rows((axis,))
        order = transform.order if transform.order.ndim == 1 else transform.order[blocks]
        places = torch.arange(int(self.value.meta["val"].shape[axis]))
        places[rows] = rows.gather(1, order.expand(rows.shape))
        return places

    def _matrix(self, transform: Permute | Rotate, axes: tuple[int, ...]) -> Tensor:
        """M with v·M the transform of the flattened ``axes``; untouched positions stay."""
        rows, blocks = self._rows(axes)
        shape = self.layout.codes.shape[-len(axes):]
        matrix = torch.eye(int(torch.tensor(shape).prod()), dtype=torch.float64)
        if isinstance(transform, Rotate):
            part = transform.matrix.double()
        else:
            n = transform.order.shape[-1]
            part = torch.eye(n, dtype=torch.float64)[transform.order].mT
        part = part.expand(len(rows), *part.shape) if part.ndim == 2 else part[blocks]
        matrix[rows.unsqueeze(2), rows.unsqueeze(1)] = part
        return matrix
