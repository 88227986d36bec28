"""Put a transform into a region: parameters are rewritten, what is left becomes operators.

Parameters are computed in float64 and rounded once, to the dtype that they had. A parameter that
several operators read is rewritten for each as its region asks: where all ask for the same it
stays one tensor, else it is stored once for each answer.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx
from torch import Tensor

from scaleprop.errors import PassError, describe
from scaleprop.passes.rewrite import Rewriter, parameters_behind
from scaleprop.passes.transforms.emit import emit
from scaleprop.passes.transforms.region import Absorbed, Region
from scaleprop.passes.transforms.transform import Centre, Permute, Rotate, Scale, Shift, Transform
from scaleprop.rules.channels import Layout, Slot, block_rows

aten: Any = torch.ops.aten

Node = torch.fx.Node


def apply(rewriter: Rewriter, region: Region, transform: Transform, why: str) -> None:
    """Replace every value of ``region`` by its transform, in ``rewriter``'s graph.

    why: for the provenance of what is made.

    Raises:
        PassError: where the transform is of another kind or size than the region.
    """
    _check(region, transform)
    _Work(rewriter, region, transform, why).run()


def _check(region: Region, transform: Transform) -> None:
    kinds = {region.kind, "sign"} if transform.kind == "scale" else {region.kind}
    if transform.kind not in kinds and not (transform.kind == "scale" and region.kind == "sign"):
        raise PassError(f"a transform of kind {transform.kind!r} cannot be put into a region of "
                        f"kind {region.kind!r}: signs, say, do not pass where scales do")
    block = getattr(transform, "block", 1)
    if block != region.block:
        raise PassError(f"the transform mixes blocks of {block} channels, the region of "
                        f"{region.block}")
    if isinstance(transform, (Scale, Shift)) and transform.values.shape != (region.size,):
        raise PassError(f"the transform is for {transform.values.numel()} channels, the region "
                        f"has {region.size}")
    if isinstance(transform, (Scale, Shift)):
        neutral = 1.0 if isinstance(transform, Scale) else 0.0
        if not region.agrees(transform.values, neutral):
            raise PassError("channels that are one would be transformed differently, or one that "
                            "must stay as it is. Remedy: Region.shared makes factors consistent, "
                            "Region.pooled numbers")


class _Work:
    """One transform on its way into the graph."""

    def __init__(
        self, rewriter: Rewriter, region: Region, transform: Transform, why: str
    ) -> None:
        self.rewriter = rewriter
        self.region = region
        self.transform = transform
        self.why = why
        self._made: dict[Any, Node] = {}

    def run(self) -> None:
        together: dict[tuple[Node, Slot], list[Absorbed]] = {}
        for item in self.region.absorbed:
            together.setdefault((item.user, item.slot), []).append(item)
        for items in together.values():
            self._absorb(items)
        for node, layout in self.region.counters:
            self._counter(node, layout)
        self._cut()
        if isinstance(self.transform, Centre):
            self._centred_norms()
        self.rewriter.modified = True

    def _absorb(self, items: list[Absorbed]) -> None:
        """All that one operand takes up: of what is read, say, and of what is made."""
        item = items[0]
        tensor = self.rewriter.constant_value(item.operand)
        if item.operand is None:
            given = _given_like(item.user)
            shape = [1] * (item.layout.axes[-1] + 1)
            for axis, size in zip(item.layout.axes, item.layout.codes.shape, strict=True):
                shape[axis] = size
            tensor = torch.full(shape, item.missing or 0.0, dtype=given.dtype)
            name = f"{item.user.name}_operand{item.slot}"
        else:
            name = str((parameters_behind(item.operand) or [item.operand])[0].target)
        if tensor is None:
            raise PassError(f"{describe(item.user)}: its operand {item.operand} is no tensor")
        layouts = [one.layout for one in items]
        key = (item.operand or name, *((one.axes, one.codes.tobytes()) for one in layouts))
        if key not in self._made:
            changed = transformed(tensor, layouts, self.transform, self.region)
            at = item.user if item.operand is None else item.operand
            self._made[key] = self.rewriter.constant(changed, name, at=at, why=self.why)
        _substitute(item.user, item.slot, self._made[key])
        self._drop(item.operand, self._made[key])

    def _drop(self, old: Any, new: Node) -> None:
        """The new tensor takes the name of one that nothing reads any more."""
        if isinstance(old, Node) and old.op == "get_attr" and not old.users:
            self.rewriter.take_name(old, new)

    def _counter(self, node: Node, layout: Layout) -> None:
        """W·z joins the bias: W·x + b = W·(x − z) + (b + W·z)."""
        assert isinstance(self.transform, Shift)
        weight = self.rewriter.constant_value(node.args[1])
        if weight is None:
            raise PassError(f"{describe(node)}: its weight is computed from inputs")
        codes = torch.from_numpy(layout.codes)
        shift = torch.where(codes < 0, 0.0, self.transform.values[codes.clamp_min(0) >> 1])
        added = weight.double().flatten(2).sum(-1) @ shift if weight.ndim > 2 else (
            weight.double() @ shift)  # fmt: skip
        old: Any = node.args[2] if len(node.args) > 2 else None
        bias = None if old is None else self.rewriter.constant_value(old)
        if old is not None and bias is None:
            raise PassError(f"{describe(node)}: its bias is computed from inputs")
        total = (added if bias is None else bias.double() + added).to(weight.dtype)
        name = str(old.target) if isinstance(old, Node) and old.op == "get_attr" else (
            f"{node.name}_bias")  # fmt: skip
        new = self.rewriter.constant(total, name, at=node, why=self.why)
        _substitute(node, 2, new)
        self._drop(old, new)

    def _cut(self) -> None:
        after = {cut.value for cut in self.region.cuts if cut.user is None}
        cut_off: dict[Node, list[Node]] = {value: [] for value in after}
        for cut in self.region.cuts:
            if cut.user is not None:
                cut_off.setdefault(cut.value, []).append(cut.user)
        for value, users in cut_off.items():
            layout = self.region.members[value]
            if value in after:
                self._transform_after(value, layout, users)
            else:
                plain = emit(self.rewriter, value, layout, self.transform, self.region,
                             inverse=True, why=self.why)  # fmt: skip
                self._reroute(value, plain, users)

    def _transform_after(self, value: Node, layout: Layout, plain_users: list[Node]) -> None:
        """Those who were cut off read the value as it was."""
        readers = [user for user in value.users if user not in _readers(plain_users)]
        new = emit(self.rewriter, value, layout, self.transform, self.region, inverse=False,
                   why=self.why)  # fmt: skip
        for user in readers:
            user.replace_input_with(value, new)
        mixed = [user for user in _readers(plain_users) if not _all_items(user, plain_users)]
        for user in mixed:
            self._split_reader(user, value, new, [item for item in user.users
                                                  if item not in plain_users])  # fmt: skip

    def _reroute(self, value: Node, plain: Node, users: list[Node]) -> None:
        for user in _readers(users):
            if _all_items(user, users):
                user.replace_input_with(value, plain)
            else:
                chosen = [item for item in user.users if item in users]
                self._split_reader(user, value, plain, chosen)

    def _split_reader(self, reader: Node, old: Node, new: Node, items: list[Node]) -> None:
        """A call that makes a tuple is made twice: ``items`` are read from that of ``new``."""
        with self.rewriter.graph.inserting_after(reader):
            twin = self.rewriter.graph.node_copy(reader)
        twin.meta = dict(reader.meta)
        twin.replace_input_with(old, new)
        for item in items:
            item.replace_input_with(reader, twin)

    def _centred_norms(self) -> None:
        """A layer_norm of what has no mean is an RMS norm, and its bias a sum."""
        for value in list(self.region.members):
            for user in list(value.users):
                if user.target is not aten.layer_norm.default:
                    continue
                x, shape, weight, bias, eps = (*user.args, *_LAYER_NORM[len(user.args):])[:5]
                new = self.rewriter.call(aten.rms_norm.default, (x, shape, weight, eps), at=user,
                                         why="what it reads has no mean")
                if bias is not None:
                    new = self.rewriter.call(aten.add.Tensor, (new, bias), at=user,
                                             why="the norm's bias")
                self.rewriter.replace(user, new)


_LAYER_NORM = (None, None, None, None, 1e-5)


def _readers(users: list[Node]) -> list[Node]:
    """Whose arguments to change: the call that makes the tuple that a user reads an item of."""
    found = [user.args[0] if user.target is operator.getitem else user for user in users]
    return [user for user in dict.fromkeys(found) if isinstance(user, Node)]


def _all_items(reader: Node, users: list[Node]) -> bool:
    made = reader.meta.get("val")
    return not isinstance(made, (tuple, list)) or reader.op == "output" or all(
        item in users for item in reader.users)


def _given_like(user: Node) -> Tensor:
    value = user.meta["val"]
    return value[0] if isinstance(value, (tuple, list)) else value


def _substitute(user: Node, slot: Slot, new: Node) -> None:
    args: list[Any] = list(user.args)
    if isinstance(slot, tuple):
        inner = list(args[slot[0]])
        inner[slot[1]] = new
        args[slot[0]] = inner
    else:
        args += [None] * (slot + 1 - len(args))
        args[slot] = new
    user.args = tuple(args)


def transformed(
    tensor: Tensor, layouts: list[Layout], transform: Transform, region: Region
) -> Tensor:
    """``tensor`` with the channels of each layout transformed: in float64, rounded once."""
    result = tensor.detach().double()
    for layout in layouts:
        if isinstance(transform, (Scale, Shift)):
            result = _each(result, layout, transform)
        else:
            result = _mixed(result, layout, transform, region)
    # strides of axes of size 1 count: a convolution takes its memory format from them
    return result.to(tensor.dtype).clone(memory_format=torch.contiguous_format)


def _each(wide: Tensor, layout: Layout, transform: Scale | Shift) -> Tensor:
    codes = torch.from_numpy(layout.codes)
    channel = codes.clamp_min(0) >> 1
    shape = [1] * wide.ndim
    for axis, size in zip(layout.axes, codes.shape, strict=True):
        shape[axis] = size
    if isinstance(transform, Shift):
        return wide - torch.where(codes < 0, 0.0, transform.values[channel]).reshape(shape)
    factor = torch.where(codes % 2 == 1, transform.other[channel], transform.values[channel])
    return wide * torch.where(codes < 0, 1.0, factor).reshape(shape)


def _mixed(
    wide: Tensor, layout: Layout, transform: Permute | Rotate | Centre, region: Region
) -> Tensor:
    rows = block_rows(layout, region.block)
    blocks = (layout.codes.reshape(-1)[rows[:, 0]] >> 1) // region.block
    places = torch.from_numpy(rows)
    moved = wide.movedim(layout.axes, tuple(range(-len(layout.axes), 0)))
    flat = moved.flatten(-len(layout.axes)) if len(layout.axes) > 1 else moved
    taken = flat[..., places]  # [..., blocks, n]
    if isinstance(transform, Rotate):
        matrix = transform.matrix if transform.is_shared else transform.matrix[
            torch.from_numpy(blocks)]  # fmt: skip
        new = taken @ matrix if matrix.ndim == 2 else torch.einsum(
            "...bn,bnm->...bm", taken, matrix)
    elif isinstance(transform, Permute):
        order = transform.order if transform.order.ndim == 1 else transform.order[
            torch.from_numpy(blocks)]  # fmt: skip
        new = taken.gather(-1, order.expand(taken.shape))
    else:
        new = taken - taken.mean(-1, keepdim=True)
    flat = flat.clone()
    flat[..., places] = new
    moved = flat.reshape(moved.shape)
    return moved.movedim(tuple(range(-len(layout.axes), 0)), layout.axes)


