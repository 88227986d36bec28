"""Regions: all values that must share a transform, what absorbs it, and what is left to run.

A value is chosen, ``v → T(v)``, and the rules of operators are followed in both directions until
nothing new must carry the transform: parameters absorb it, other values carry it on. An operator
that cannot let it pass is *cut* off: what it reads is transformed back at run time, what it makes
is transformed at run time. A region without cuts costs nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.fx

from scaleprop.errors import PassError, source_line
from scaleprop.passes.transforms.channel_set import ChannelSet
from scaleprop.rules.channels import (
    MIXING,
    Codes,
    Kind,
    Layout,
    Refused,
    Slot,
    block_rows,
    channel_rule,
    sizes_of,
)

Node = torch.fx.Node

aten: Any = torch.ops.aten

_TRIALS = 12  # of regions, where operators leave a choice
# what reads shapes and dtypes only
_SHAPE_ONLY = frozenset((
    aten.full_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_full.default,
    aten.new_empty.default, aten.new_ones.default,
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Absorbed:
    """An operand that takes up a transform: a parameter, or one that is made (``missing``)."""

    user: Node
    slot: Slot
    operand: Any
    layout: Layout
    missing: float | None = None


@dataclasses.dataclass(frozen=True)
class Cut:
    """Where a transform is undone (before ``user`` reads ``value``) or done (``user`` None: after
    ``value`` is made) at run time, and why."""

    value: Node
    user: Node | None
    reason: str

    def __str__(self) -> str:
        where = self.user if self.user is not None else self.value
        side = "before" if self.user is not None else "after"
        return f"{side} {where.name!r} ({where.target}, {source_line(where)}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Region:
    """Where one transform of kind ``kind`` lives.

    seed: the value it was asked for; its channels, in row-major order of the layout's axes, are
        the transform's. block: channels that are mixed with each other (1 where none are).
    members: value → its layout. absorbed: operands that take the transform up. cuts: what is left
    to do at run time. counters: contractions that undo a shift in their bias. channels: which of
    the seed's channels are one.
    """

    kind: Kind
    seed: Node
    block: int
    members: Mapping[Node, Layout]
    absorbed: tuple[Absorbed, ...]
    cuts: tuple[Cut, ...]
    counters: tuple[tuple[Node, Layout], ...]
    channels: ChannelSet

    @property
    def size(self) -> int:
        """How many channels the seed has."""
        return self.channels.count

    @property
    def runtime(self) -> int:
        """How many operators are left to run: one for each value that has to be transformed."""
        made = {cut.value for cut in self.cuts if cut.user is None}
        undone = {cut.value for cut in self.cuts if cut.user is not None} - made
        return len(made) + len(undone)

    @property
    def is_free(self) -> bool:
        """Whether parameters absorb everything."""
        return not self.cuts

    def pooled(self, values: torch.Tensor, largest: bool = True) -> torch.Tensor:
        """One number per channel, [size]: of those that are one the largest (or least)."""
        root, _ = self.channels.representative
        index = torch.from_numpy(root)
        empty = torch.full_like(values, -torch.inf if largest else torch.inf)
        found = empty.scatter_reduce(0, index, values, "amax" if largest else "amin")
        return found[index]

    def shared(self, scale: torch.Tensor) -> torch.Tensor:
        """Positive numbers per channel, [size], made consistent: the geometric mean of channels
        that are one; 1 where only the identity passes."""
        root, inverted = self.channels.representative
        index, sign = torch.from_numpy(root), torch.from_numpy(1.0 - 2.0 * inverted)
        log = scale.double().log() * sign
        total = torch.zeros_like(log).index_add_(0, index, log)
        count = torch.zeros_like(log).index_add_(0, index, torch.ones_like(log))
        mean = (total / count.clamp_min(1))[index] * sign
        mean[torch.from_numpy(self.channels.pinned)] = 0.0
        return mean.exp()

    def agrees(self, values: torch.Tensor, neutral: float) -> bool:
        """Whether numbers per channel, [size], are one for channels that are one (the inverse of
        it for those that carry the inverse), and ``neutral`` where only the identity passes."""
        root, inverted = (torch.from_numpy(part) for part in self.channels.representative)
        expected = torch.where(inverted == 1, 1 / values[root], values[root])
        expected[torch.from_numpy(self.channels.pinned)] = neutral
        return torch.allclose(expected, values, rtol=1e-9, atol=0.0)

    def layout(self, value: Node) -> Layout | None:
        """Which channels ``value`` carries where."""
        return self.members.get(value)


def find_region(
    seed: Node,
    kind: Kind,
    *,
    axes: tuple[int, ...] = (-1,),
    block: int | None = None,
    only_users: Collection[Node] | None = None,
    stops: Collection[Node] = (),
) -> Region:
    """The region of a transform of the channels of ``seed``.

    axes: of the seed, along which its channels lie. block: how many consecutive channels are mixed
    by a rotation or permutation; None: all of them. only_users: who reads the transformed value;
    all others read it as it was, so it is transformed at run time. None: everyone. stops: values
    that are transformed where they are made, if at all, and not further back.

    Raises:
        PassError: where the channels' axes have no fixed size, or ``block`` does not divide it.
    """
    sizes = sizes_of(seed)
    places = tuple(sorted(axis % len(sizes) for axis in axes))
    shape = [sizes[axis] for axis in places]
    fixed = all(isinstance(seed.meta["val"].shape[axis], int) for axis in places)
    count = int(np.prod(shape))
    size = (block or count) if kind in MIXING else 1
    if not fixed or count == 0 or count % size:
        raise PassError(f"{seed.name!r} {tuple(seed.meta['val'].shape)} has no channels in blocks "
                        f"of {size} along axes {places}. Remedy: another block size")
    start = Layout(places, 2 * np.arange(count, dtype=np.int64).reshape(shape))
    best: Region | None = None
    pending: list[dict[Node, int]] = [{}]
    tried: set[frozenset[tuple[Node, int]]] = set()
    while pending and len(tried) < _TRIALS:
        choices = pending.pop(0)
        key = frozenset(choices.items())
        if key in tried:
            continue
        tried.add(key)
        growth = _Growth(seed, start, kind, size, only_users, stops, choices)
        found = growth.region()
        if best is None or (found.runtime, len(found.members)) < (best.runtime, len(best.members)):
            best = found
            pending += [{**choices, node: option} for node, count in growth.options.items()
                        for option in range(count) if option != choices.get(node, 0)]  # fmt: skip
        if best.is_free:
            break
    assert best is not None
    return best


class _Growth:
    """One region being found, with given answers to what operators leave open."""

    def __init__(
        self,
        seed: Node,
        start: Layout,
        kind: Kind,
        block: int,
        only_users: Collection[Node] | None,
        stops: Collection[Node],
        choices: Mapping[Node, int],
    ) -> None:
        self.kind: Kind = kind
        self.block = block
        self.choices = choices
        self.options: dict[Node, int] = {}
        self.members: dict[Node, Layout] = {}
        self.absorbed: dict[tuple[Node, Slot, int], Absorbed] = {}
        self.sides: dict[tuple[Node, Slot], int] = {}
        self.counters: dict[Node, Layout] = {}
        self.opaque: dict[Node, str] = dict.fromkeys(stops, "it is transformed where it is made")
        self.channels = ChannelSet(start.codes.size)
        self._seed = seed
        self._order = {node: place for place, node in enumerate(seed.graph.nodes)}
        self._queue: list[int] = []
        self._nodes = list(seed.graph.nodes)
        self.constants = _constants(self._nodes)
        self._waiting: set[Node] = set()
        if only_users is not None:
            self.opaque[seed] = "it is transformed for some of its readers only"
            for user in _consumers(seed):
                if user not in only_users:
                    self.opaque[user] = "it reads the value as it was"
        self.put(seed, start)

    def region(self) -> Region:
        """Follow the rules until nothing changes."""
        while self._queue:
            node = self._nodes[heapq.heappop(self._queue)]
            self._waiting.discard(node)
            self._visit(node)
        return Region(
            kind=self.kind, seed=self._seed, block=self.block,
            members={node: self._canonical(layout) for node, layout in self.members.items()
                     if not layout.is_empty},
            absorbed=tuple(dataclasses.replace(item, layout=self._canonical(item.layout))
                           for item in self.absorbed.values() if not item.layout.is_empty),
            cuts=tuple(self._cuts()),
            counters=tuple((node, self._canonical(layout))
                           for node, layout in self.counters.items()),
            channels=self.channels,
        )  # fmt: skip

    def _canonical(self, layout: Layout) -> Layout:
        return Layout(layout.axes, self.channels.canonical(layout.codes))

    def _cuts(self) -> Iterable[Cut]:
        for node, reason in self.opaque.items():
            for value in _operands(node):
                if value in self.members and not self.members[value].is_empty:
                    yield Cut(value, node, reason)
            if node in self.members and not self.members[node].is_empty:
                yield Cut(node, None, reason)

    def put(self, value: Node, layout: Layout) -> None:
        """``value`` carries ``layout``, besides what it carries already."""
        if self.kind != "permute" and not value.meta["val"].is_floating_point():
            raise Refused(f"{value.name} holds no floats")
        merged, changed = self._merge(self.members.get(value), layout, sizes_of(value))
        if not changed:
            return
        self.members[value] = merged
        if changes := writers(value):
            last = max(self._order[node] for node in changes)
            early = [user for user in _consumers(value) if self._order[user] <= last]
            self.opaque.update(dict.fromkeys([value, *early], "it is written in place"))
        self._wake(value)
        for user in _consumers(value):
            self._wake(user)

    def _wake(self, node: Node) -> None:
        if node not in self._waiting:
            self._waiting.add(node)
            heapq.heappush(self._queue, self._order[node])

    def _merge(
        self, old: Layout | None, new: Layout, sizes: tuple[int, ...]
    ) -> tuple[Layout, bool]:
        if any(axis >= len(sizes) or sizes[axis] != size
               for axis, size in zip(new.axes, new.codes.shape, strict=True)):  # fmt: skip
            raise Refused("an operand is repeated over the channels")
        new = self._checked(self._plain(new))
        if old is None or old.is_empty:
            return new, not new.is_empty
        if new.is_empty:
            return old, False
        if not (set(old.axes) <= set(new.axes) or set(old.axes) >= set(new.axes)):
            raise Refused(f"channels lie along axes {old.axes}, and others along {new.axes}")
        axes = tuple(sorted({*old.axes, *new.axes}))
        mine, theirs = old.on(axes, sizes), new.on(axes, sizes)
        both = (mine >= 0) & (theirs >= 0)
        joined = self._join(mine[both], theirs[both])
        filled = bool(((mine < 0) & (theirs >= 0)).any())
        if not filled:
            if joined:
                self._wake_all()
            return old, False
        merged = Layout(axes, np.where(mine < 0, theirs, mine)).trimmed()
        if joined:
            self._wake_all()
        return self._checked(merged), True

    def _wake_all(self) -> None:
        """Channels became one: nothing else has to move, but every rule is asked once more."""
        for node in self.members:
            self._wake(node)

    def _join(self, left: Codes, right: Codes) -> bool:
        if self.kind in MIXING and bool((((left ^ right) >> 1) != 0).any()):
            places = (left >> 1) % self.block, (right >> 1) % self.block
            if bool((places[0] != places[1]).any()):
                raise Refused("channels of one block would have to be equal")
        return self.channels.join(left, right)

    def _plain(self, layout: Layout) -> Layout:
        """Inverse transposes of rotations, permutations are they themselves; shifts have none."""
        if self.kind in ("scale", "sign"):
            return layout
        return Layout(layout.axes, np.where(layout.codes < 0, layout.codes, layout.codes & ~1))

    def _checked(self, layout: Layout) -> Layout:
        if self.kind in MIXING and not layout.is_empty:
            block_rows(layout, self.block)
        return layout

    def _visit(self, node: Node) -> None:
        if node in self.opaque:
            return
        flow = _Call(self, node)
        reads = any(flow.of(value) is not None for value in _operands(node))
        if not reads and node not in self.members:
            return
        if node.target in _SHAPE_ONLY and node not in self.members:
            return
        try:
            if node.op == "placeholder":
                raise Refused("it is an input")
            if node.op == "output":
                raise Refused("the model returns it")
            rule = channel_rule(node)
            if rule is None:
                raise Refused("no rule says how channels pass this operator")
            rule(flow)
        except Refused as reason:
            self._isolate(node, str(reason))

    def _isolate(self, node: Node, reason: str) -> None:
        self.opaque[node] = reason
        self.counters.pop(node, None)
        reader = _reader(node)
        dropped = [key for key in self.absorbed if key[0] is reader]
        for key in dropped:
            del self.absorbed[key]
        if dropped and reader is not node:  # other items of the tuple read the same parameters
            for item in reader.users:
                self.opaque.setdefault(item, reason)

    def absorb(self, user: Node, slot: Slot, operand: Any, layout: Layout,
               missing: float | None, side: int) -> None:
        """A parameter in ``slot`` of ``user`` takes ``layout`` up."""
        key = (user, slot, side)
        old = self.absorbed.get(key)
        sizes = sizes_of(operand) or _sizes_like(layout)
        merged, _ = self._merge(old.layout if old else None, layout, sizes)
        self.absorbed[key] = Absorbed(user, slot, operand, merged, missing)


def writers(value: Node) -> list[Node]:
    """The calls that change a value in place, or a view of it."""
    found: list[Node] = []
    pending = [value]
    while pending:
        node = pending.pop()
        for user in node.users:
            schema = getattr(user.target, "_schema", None)
            if schema is None or not user.args or user.args[0] is not node:
                continue
            if schema.is_mutable:
                found.append(user)
            elif schema.arguments[0].alias_info is not None:
                pending.append(user)
    return found


def _sizes_like(layout: Layout) -> tuple[int, ...]:
    """Of an operand that is not given: as large as its layout."""
    sizes = [1] * (layout.axes[-1] + 1)
    for axis, size in zip(layout.axes, layout.codes.shape, strict=True):
        sizes[axis] = size
    return tuple(sizes)


class _Call:
    """What a rule sees of one call: a ``Flow``."""

    def __init__(self, growth: _Growth, node: Node) -> None:
        self._growth = growth
        self.node = node

    @property
    def kind(self) -> Kind:
        return self._growth.kind

    @property
    def block(self) -> int:
        return self._growth.block

    @property
    def out(self) -> Layout | None:
        return self.of(self.node)

    def of(self, value: Any) -> Layout | None:
        layout = self._growth.members.get(value) if isinstance(value, Node) else None
        return None if layout is None or layout.is_empty else layout

    def result(self, layout: Layout) -> None:
        self._growth.put(self.node, layout)

    def carry(self, value: Any, layout: Layout, slot: Slot, missing: float | None = None,
              side: int = 0) -> None:
        if layout.is_empty:
            return
        user = _reader(self.node)
        if value is None and missing is not None:
            self._growth.absorb(user, slot, None, layout, missing, side)
        elif not isinstance(value, Node) or not sizes_of(value):
            raise Refused(f"{value!r} cannot carry it")
        elif self.is_parameter(value):
            if not value.meta["val"].is_floating_point():
                raise Refused(f"{value.name} holds no floats")
            self._growth.absorb(user, slot, value, layout, missing, side)
        elif self._growth.sides.setdefault((user, slot), side) != side:
            raise Refused(f"{value.name}, which is computed, would carry what is read and made")
        else:
            self._growth.put(value, layout)

    def is_parameter(self, value: Any) -> bool:
        return value in self._growth.constants

    def choose(self, count: int) -> int:
        self._growth.options[self.node] = count
        return min(self._growth.choices.get(self.node, 0), count - 1)

    def counter(self, layout: Layout) -> None:
        if not self.is_parameter(self.node.args[1]):
            raise Refused("its weight is computed from inputs")
        self._growth.counters[self.node] = layout


def _constants(nodes: Iterable[Node]) -> set[Node]:
    """Parameters, buffers, and what is made of them alone."""
    found: set[Node] = set()
    for node in nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        made = node.op == "call_function" and node.all_input_nodes and not is_random
        if node.op == "get_attr" or (made and all(part in found for part in node.all_input_nodes)):
            found.add(node)
    return found


def _reader(node: Node) -> Node:
    """Whose argument it is: reading an item of a tuple is part of the call that made the tuple."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, Node)
    return source


def _operands(node: Node) -> list[Node]:
    """The tensors that a call reads; those of the call that made the tuple, for one item of it."""
    if node.target is operator.getitem:
        return _reader(node).all_input_nodes
    return node.all_input_nodes


def _consumers(value: Node) -> list[Node]:
    """Who reads ``value``: of calls that make tuples, those that read their items."""
    found: list[Node] = []
    for user in value.users:
        made = user.meta.get("val")
        if user.op == "output" or isinstance(made, torch.Tensor):
            found.append(user)
        elif isinstance(made, (tuple, list)):
            found += list(user.users)
    return found
