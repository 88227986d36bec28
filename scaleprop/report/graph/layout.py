"""Places boxes in layers, so that edges run downward and labels have a place of their own.

Longest paths give layers; barycentres give the order in each; places are those of least squared
bends at which nothing overlaps. Boxes stand in even layers, labels in odd ones: an edge is straight
within a layer and bends between two, so that it runs through neither box nor label.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

_GAP = 14.0  # between neighbours in a layer
_LANE = 10.0  # width of an edge's place in a layer that it passes
_PORT = 12.0  # between the ends of two edges on one box
_SWEEPS = 24
_PATIENCE = 6  # sweeps without fewer crossings, after which there are no more
_BETWEEN = (12.0, 46.0)  # between two layers, by how far edges run sideways
_SLANT = 0.14
_STRAIGHT = 8.0  # weight of the bends of an edge that passes layers, to that of one at its box
_STRAIGHTENED = 4  # times that strings are brought into line

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle by its centre."""

    x: float
    y: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Line:
    """An edge to be placed: from box to box, by number; the size of its label, (0, 0) for none."""

    source: int
    target: int
    label: tuple[float, float] = (0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Route:
    """An edge's course: vertical from each even point to the next odd one, then a bend to the one
    after it. label: the rectangle of its label, right of the edge; None without one."""

    points: tuple[Point, ...]
    label: Box | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """Places of boxes and routes of lines, in the order in which they were given; all at or above
    0."""

    boxes: tuple[Box, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


@dataclasses.dataclass
class _Vertex:
    """A box, or an edge's place in a layer: with a label right of it, where ``anchor`` is not 0."""

    layer: int
    width: float
    height: float
    anchor: float = 0.0  # where edges meet it, from its centre
    pull: float = 0.0  # 1 ÷ the layers that its edge spans; 0 for a box

    x: float = 0.0
    above: list[int] = dataclasses.field(default_factory=list[int])
    below: list[int] = dataclasses.field(default_factory=list[int])

    @property
    def is_box(self) -> bool:
        return not self.pull

    @property
    def line(self) -> float:
        """Where edges run."""
        return self.x + self.anchor


def place(sizes: Sequence[tuple[float, float]], lines: Sequence[Line]) -> Layout:
    """Boxes of these widths and heights, joined by ``lines``. The same input gives the same places.

    Raises:
        ValueError: where lines run in a circle.
    """
    layers_of = _layers(len(sizes), lines)
    vertices = [_Vertex(layer, *size)
                for layer, size in zip(layers_of, sizes, strict=True)]
    chains = [_chain(vertices, line) for line in lines]
    rows = _order(vertices)
    _spread(vertices, rows)
    tops, height = _heights(vertices, rows)
    return _finished(vertices, lines, chains, tops, height)


def _layers(count: int, lines: Sequence[Line]) -> list[int]:
    """The layer of each box, as far down as those that read it allow where that is shorter."""
    above: list[list[int]] = [[] for _ in range(count)]
    below: list[list[int]] = [[] for _ in range(count)]
    for line in lines:
        above[line.target].append(line.source)
        below[line.source].append(line.target)
    missing = [len(set(sources)) for sources in above]
    ready = [box for box in range(count) if not missing[box]]
    order: list[int] = []
    while ready:
        box = ready.pop(0)
        order.append(box)
        for reader in dict.fromkeys(below[box]):
            missing[reader] -= 1
            if not missing[reader]:
                bisect.insort(ready, reader)
    if len(order) < count:
        raise ValueError("lines run in a circle")
    layer = [0] * count
    for box in order:
        layer[box] = max((layer[source] + 2 for source in above[box]), default=0)
    free: set[int] = set()  # with all above it to be moved without making an edge longer
    for box in order:
        if all(source in free and len(set(below[source])) == 1 for source in above[box]):
            free.add(box)
    for box in reversed(order):
        if below[box] and (box in free or len(below[box]) > len(above[box])):
            layer[box] = min(layer[reader] - 2 for reader in below[box])
    first = min(layer, default=0)
    return [each - first for each in layer]


def _chain(vertices: list[_Vertex], line: Line) -> list[int]:
    """The vertices of a line: its boxes, and a place in each layer between. The label is in the
    layer above the target."""
    first, last = vertices[line.source].layer, vertices[line.target].layer
    chain = [line.source]
    width, height = line.label
    pull = 2.0 / (last - first)
    for layer in range(first + 1, last):
        is_label = layer == last - 1 and width > 0
        made = _Vertex(layer, width + _LANE, height, -width / 2, pull) if is_label \
            else _Vertex(layer, _LANE, 0.0, 0.0, pull)
        chain.append(len(vertices))
        vertices.append(made)
    chain.append(line.target)
    for upper, lower in itertools.pairwise(chain):
        vertices[upper].below.append(lower)
        vertices[lower].above.append(upper)
    return chain


def _order(vertices: Sequence[_Vertex]) -> list[list[int]]:
    """The vertices of each layer from left to right, with few crossings."""
    rows = _first_order(vertices)
    best, fewest, idle = [list(row) for row in rows], _crossings(vertices, rows), 0
    for sweep in range(_SWEEPS):
        downward = sweep % 2 == 0
        for row, fixed in _pairs(rows, downward):
            _by_barycentre(vertices, row, fixed, downward)
        _swap_neighbours(vertices, rows)
        count = _crossings(vertices, rows)
        idle += 1
        if count < fewest:
            best, fewest, idle = [list(row) for row in rows], count, 0
        if idle > _PATIENCE or not fewest:
            break
    return best


def _first_order(vertices: Sequence[_Vertex]) -> list[list[int]]:
    """As a walk from the first layer's boxes downward meets them."""
    rows: list[list[int]] = [[] for _ in range(1 + max((v.layer for v in vertices), default=-1))]
    seen: set[int] = set()
    for start in sorted(range(len(vertices)), key=lambda v: (bool(vertices[v].above), v)):
        waiting = [start]
        while waiting:
            vertex = waiting.pop()
            if vertex in seen:
                continue
            seen.add(vertex)
            rows[vertices[vertex].layer].append(vertex)
            waiting.extend(reversed(vertices[vertex].below))
    return rows


def _pairs(rows: Sequence[list[int]], downward: bool) -> list[tuple[list[int], list[int]]]:
    """Each layer with the one before it in a sweep."""
    ordered = list(rows) if downward else list(reversed(rows))
    return list(zip(ordered[1:], ordered, strict=False))


def _by_barycentre(
    vertices: Sequence[_Vertex], row: list[int], fixed: Sequence[int], downward: bool
) -> None:
    """Sort ``row`` by the mean places of what it is joined to; what is joined to none stays."""
    place_of = {vertex: place for place, vertex in enumerate(fixed)}
    means: dict[int, float] = {}
    for here, vertex in enumerate(row):
        joined = vertices[vertex].above if downward else vertices[vertex].below
        means[vertex] = sum(place_of[each] for each in joined) / len(joined) if joined else \
            here * len(fixed) / len(row)
    row.sort(key=lambda vertex: means[vertex])  # stable


def _swap_neighbours(vertices: Sequence[_Vertex], rows: Sequence[list[int]]) -> None:
    """Swap neighbours as long as that takes crossings away."""
    places = {vertex: place for row in rows for place, vertex in enumerate(row)}
    for row in rows:
        improved = True
        while improved:
            improved = False
            for place in range(len(row) - 1):
                left, right = row[place], row[place + 1]
                if _between(vertices, places, left, right) > _between(
                        vertices, places, right, left):
                    row[place], row[place + 1] = right, left
                    places[left], places[right] = place + 1, place
                    improved = True


def _between(vertices: Sequence[_Vertex], places: dict[int, int], left: int, right: int) -> int:
    """Crossings of the edges of two vertices, ``left`` before ``right``."""
    total = 0
    for of_left, of_right in ((vertices[left].above, vertices[right].above),
                              (vertices[left].below, vertices[right].below)):
        total += sum(places[a] > places[b] for a in of_left for b in of_right)
    return total


def _crossings(vertices: Sequence[_Vertex], rows: Sequence[Sequence[int]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        place_of = {vertex: place for place, vertex in enumerate(lower)}
        seen: list[int] = []
        for vertex in upper:
            ends = sorted(place_of[each] for each in vertices[vertex].below)
            total += sum(len(seen) - bisect.bisect_right(seen, end) for end in ends)
            for end in ends:
                bisect.insort(seen, end)
    return total


def _spread(vertices: Sequence[_Vertex], rows: Sequence[Sequence[int]]) -> None:
    """Give every vertex its x."""
    for row in rows:
        _settle(vertices, row, [0.0] * len(row), [1.0] * len(row))
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted: list[float] = []
            weights: list[float] = []
            for number in row:
                vertex = vertices[number]
                pulls = [(vertices[each].line, _pull(vertex, vertices[each]))
                         for each in (*vertex.above, *vertex.below)]
                weight = sum(pull for _, pull in pulls)
                wanted.append(sum(x * pull for x, pull in pulls) / weight - vertex.anchor
                              if weight else vertex.x)
                weights.append(weight or 0.1)
            _settle(vertices, row, wanted, weights)
    for _ in range(_STRAIGHTENED):
        _straighten(vertices, rows)


def _pull(one: _Vertex, other: _Vertex) -> float:
    """How much an edge's bend counts: long edges leave boxes where they are."""
    if one.pull and other.pull:
        return _STRAIGHT
    return max(one.pull, other.pull)


def _straighten(vertices: Sequence[_Vertex], rows: Sequence[Sequence[int]]) -> None:
    """Bring strings of vertices, each the only one above or below the next, into line as far as
    their neighbours leave room."""
    room: dict[int, tuple[float, float]] = {}

    def measure(row: Sequence[int]) -> None:
        for place, number in enumerate(row):
            vertex = vertices[number]
            left, right = -math.inf, math.inf
            if place:
                before = vertices[row[place - 1]]
                left = before.x + (before.width + vertex.width) / 2 + _GAP
            if place + 1 < len(row):
                after = vertices[row[place + 1]]
                right = after.x - (after.width + vertex.width) / 2 - _GAP
            room[number] = left + vertex.anchor, right + vertex.anchor

    for row in rows:
        measure(row)
    for string in _strings(vertices):
        pieces: list[list[int]] = []
        low, high = math.inf, -math.inf
        for number in string:
            left, right = room[number]
            if not pieces or max(low, left) > min(high, right):
                pieces.append([])
                low, high = left, right
            pieces[-1].append(number)
            low, high = max(low, left), min(high, right)
        for piece in pieces:
            low = max(room[number][0] for number in piece)
            high = min(room[number][1] for number in piece)
            line = sorted(vertices[number].line for number in piece)[len(piece) // 2]
            for number in piece:
                vertices[number].x = min(max(line, low), high) - vertices[number].anchor
        for number in string:
            measure(rows[vertices[number].layer])


def _strings(vertices: Sequence[_Vertex]) -> list[list[int]]:
    """Longest runs of vertices in which each is all that is below the one before it, and that all
    that is above it."""

    def following(number: int) -> int | None:
        below = vertices[number].below
        return below[0] if len(below) == 1 and len(vertices[below[0]].above) == 1 else None

    found: list[list[int]] = []
    for number, vertex in enumerate(vertices):
        if len(vertex.above) == 1 and following(vertex.above[0]) == number:
            continue
        string = [number]
        while (after := following(string[-1])) is not None:
            string.append(after)
        if len(string) > 1:
            found.append(string)
    return sorted(found, key=lambda string: (-len(string), string[0]))


def _settle(
    vertices: Sequence[_Vertex], row: Sequence[int], wanted: Sequence[float],
    weights: Sequence[float],
) -> None:
    """The places nearest to the wanted ones, by weighted squares, that keep order and distance:
    neighbours that would meet move as one, to their common mean."""
    offsets: list[float] = []
    at = 0.0
    for place, number in enumerate(row):
        if place:
            at += (vertices[row[place - 1]].width + vertices[number].width) / 2 + _GAP
        offsets.append(at)
    groups: list[tuple[float, float, int]] = []  # mean, weight, how many
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        mean, count = want - offset, 1
        while groups and groups[-1][0] >= mean:
            other, heavy, several = groups.pop()
            mean = (mean * weight + other * heavy) / (weight + heavy)
            weight, count = weight + heavy, count + several
        groups.append((mean, weight, count))
    place = 0
    for mean, _, count in groups:
        for _ in range(count):
            vertices[row[place]].x = mean + offsets[place]
            place += 1


def _heights(
    vertices: Sequence[_Vertex], rows: Sequence[Sequence[int]]
) -> tuple[list[tuple[float, float]], float]:
    """Top and bottom of each layer, and of all."""
    found: list[tuple[float, float]] = []
    at = 0.0
    for place, row in enumerate(rows):
        tall = max((vertices[each].height for each in row), default=0.0)
        found.append((at, at + tall))
        at += tall
        if place + 1 < len(rows):
            aside = max((abs(vertices[each].line - vertices[below].line)
                         for each in row for below in vertices[each].below), default=0.0)
            at += min(max(_SLANT * aside, _BETWEEN[0]), _BETWEEN[1])
    return found, at


def _finished(
    vertices: Sequence[_Vertex], lines: Sequence[Line], chains: Sequence[Sequence[int]],
    tops: Sequence[tuple[float, float]], height: float,
) -> Layout:
    left = min((v.x - v.width / 2 for v in vertices), default=0.0)
    right = max((v.x + v.width / 2 for v in vertices), default=0.0)
    starts = _ports(vertices, chains, downward=True)
    ends = _ports(vertices, chains, downward=False)
    boxes = [Box(v.x - left, sum(tops[v.layer]) / 2, v.width, v.height)
             for v in vertices if v.is_box]
    routes: list[Route] = []
    for number, (line, chain) in enumerate(zip(lines, chains, strict=True)):
        source, target = boxes[line.source], boxes[line.target]
        points: list[Point] = [(starts[number] - left, source.y + source.height / 2),
                               (starts[number] - left, tops[vertices[chain[0]].layer][1])]
        label = None
        for each in chain[1:-1]:
            vertex = vertices[each]
            top, bottom = tops[vertex.layer]
            x = vertex.line - left
            points += [(x, top), (x, bottom)]
            if vertex.height:
                wide, tall = line.label
                label = Box(x + _LANE / 2 + wide / 2, (top + bottom) / 2, wide, tall)
        points += [(ends[number] - left, tops[vertices[chain[-1]].layer][0]),
                   (ends[number] - left, target.y - target.height / 2)]
        routes.append(Route(tuple(points), label))
    return Layout(tuple(boxes), tuple(routes), right - left, height)


def _ports(
    vertices: Sequence[_Vertex], chains: Sequence[Sequence[int]], downward: bool
) -> list[float]:
    """Where each chain leaves its first box, or meets its last: side by side, in the order of what
    comes next."""
    at: dict[int, list[int]] = {}
    for number, chain in enumerate(chains):
        at.setdefault(chain[0] if downward else chain[-1], []).append(number)
    found = [0.0] * len(chains)
    for box, numbers in at.items():
        following = {n: vertices[chains[n][1 if downward else -2]] for n in numbers}
        numbers.sort(key=lambda n: (following[n].line, n))
        room = min(_PORT, vertices[box].width / (len(numbers) + 1))
        for place, number in enumerate(numbers):
            found[number] = vertices[box].x + (place - (len(numbers) - 1) / 2) * room
    return found
