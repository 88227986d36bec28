"""Pictures of blocks: places, text and colours of SVG, and GraphViz's language."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scaleprop.errors import ConfigError
from scaleprop.formats.scaled import named_formats, parse
from scaleprop.report.graph import Block, BlockEdge, BlockNode, Scale, render_block
from scaleprop.report.graph.layout import Line, place
from scaleprop.report.graph.palette import colour_of

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<b>&"\\]]>\n{}'
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom


def small_block(name: str = "up") -> Block:
    return Block(
        path="layers.0", what="Layer, 1 of 2", made="int8, onnxruntime", meaning="→ scale",
        nodes=(BlockNode(name="x", label="from norm", kind="input"),
               BlockNode(name="q", label="quantize", kind="quantize", format="int8+zp"),
               BlockNode(name="w", label="up.weight", kind="parameter", format="int8[row]*f32"),
               BlockNode(name=name, label=name, module="up", detail="model.py:3 in forward"),
               BlockNode(name="add", label="add")),
        edges=(BlockEdge(source="x", target="q", detail="high precision"),
               BlockEdge(source="q", target=name, forward=Scale(0.125, format="int8+zp")),
               BlockEdge(source="w", target=name,
                         forward=Scale(0.01, 2.0**-8, 2.0**-6, "int8[row]*f32")),
               BlockEdge(source=name, target="add", backward=Scale(2.0**-7, format="e5m2")),
               BlockEdge(source="x", target="add", detail="high precision")))


def random_block(seed: int, count: int) -> Block:
    """A graph without cycles, with labels on two edges of three and some long edges."""
    draw = random.Random(seed)
    names = [f"n{number}" for number in range(count)]
    edges: dict[tuple[str, str], BlockEdge] = {}
    for number in range(1, count):
        for _ in range(draw.choice((1, 1, 2, 3))):
            other = draw.randrange(max(0, number - draw.choice((3, 3, count))), number)
            scale = Scale(2.0**draw.randrange(-12, 3)) if draw.random() < 0.67 else None
            edges[names[other], names[number]] = BlockEdge(
                source=names[other], target=names[number], forward=scale,
                backward=scale if draw.random() < 0.5 else None)
    nodes = [BlockNode(name=name, label="x" * draw.randrange(1, 30), module="m" * draw.randrange(9))
             for name in names]
    return Block(path="", what="random", made="", meaning="none", nodes=tuple(nodes),
                 edges=tuple(edges.values()))


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def groups(svg: str, kind: str) -> list[ElementTree.Element]:
    return [each for each in parsed(svg).iter(f"{SVG}g") if each.get("class") == f"sg-{kind}"]


def boxes_of(svg: str) -> dict[str, Rectangle]:
    found: dict[str, Rectangle] = {}
    for group in groups(svg, "node"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        x, y, wide, tall = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        found[str(group.get("data-node"))] = (x, y, x + wide, y + tall)
    return found


def texts_of(svg: str) -> list[Rectangle]:
    """The places of edges' labels: 10 px letters, 0.6 em wide, above their line."""
    return [(x, y - 8, x + 6.0 * len("".join(text.itertext())), y + 2)
            for group in groups(svg, "edge") for text in group.iter(f"{SVG}text")
            for x, y in ((float(text.get("x", "nan")), float(text.get("y", "nan"))),)]


def course_of(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Points along an edge, as a browser would draw its path."""
    path = next(each for each in group.iter(f"{SVG}path") if "sg-line" in each.get("class", ""))
    points: list[tuple[float, float]] = []
    for letter, numbers in re.findall(r"([MVC])([^MVC]*)", path.get("d", "")):
        given = [float(number) for number in numbers.split()]
        if letter == "M":
            points.append((given[0], given[1]))
        elif letter == "V":
            x, y = points[-1]
            points += [(x, y + (given[0] - y) * step / 9) for step in range(1, 10)]
        else:
            p = [points[-1], *zip(given[::2], given[1::2], strict=True)]
            for step in range(1, 20):
                t = step / 19
                weights = ((1 - t)**3, 3 * t * (1 - t)**2, 3 * t * t * (1 - t), t**3)
                points.append((sum(w * x for w, (x, _) in zip(weights, p, strict=True)),
                               sum(w * y for w, (_, y) in zip(weights, p, strict=True))))
    return points


def overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def assert_legible(block: Block) -> None:
    """Nothing lies on anything: boxes, labels, and edges but at their own boxes."""
    svg = render_block(block)
    boxes, texts = boxes_of(svg), texts_of(svg)
    assert set(boxes) == {node.name for node in block.nodes}
    for one, other in itertools.combinations([*boxes.values(), *texts], 2):
        assert not overlap(one, other)
    drawn = [(group.get("data-source"), group.get("data-target")) for group in groups(svg, "edge")]
    assert sorted(drawn) == sorted((edge.source, edge.target) for edge in block.edges)
    for group, (source, target) in zip(groups(svg, "edge"), drawn, strict=True):
        course = course_of(group)
        assert abs(course[0][1] - boxes[str(source)][3]) < 0.2
        assert 0 < boxes[str(target)][1] - course[-1][1] < 8  # where the arrow's head begins
        for x, y in course[1:]:
            touched = [name for name, (left, top, right, bottom) in boxes.items()
                       if left < x < right and top < y < bottom]
            assert not touched
            assert not [text for text in texts
                        if text[0] < x < text[2] and text[1] < y < text[3]]
    width, height = map(float, parsed(svg).get("viewBox", "").split()[2:])
    for left, top, right, bottom in [*boxes.values(), *texts]:
        assert left >= 0
        assert right <= width
        assert top >= 0
        assert bottom <= height


@pytest.mark.parametrize(("seed", "count"), [(0, 2), (1, 10), (2, 25), (3, 40), (4, 60)])
def test_nothing_overlaps(seed: int, count: int) -> None:
    assert_legible(random_block(seed, count))


def test_the_small_block_is_legible_and_says_its_scales() -> None:
    block = small_block()
    assert_legible(block)
    svg = block.svg()
    labels = {(group.get("data-source"), group.get("data-target")):
              ["".join(text.itertext()) for text in group.iter(f"{SVG}text")]
              for group in groups(svg, "edge")}
    assert labels == {("x", "q"): [], ("q", "up"): ["→ 2^-3"], ("w", "up"): ["→ 2^-8…2^-6"],
                      ("up", "add"): ["← 2^-7"], ("x", "add"): []}
    titles = ["".join(group.find(f"{SVG}title").itertext())  # type: ignore[union-attr]
              for group in groups(svg, "edge")]
    assert titles[0] == "x to q\nhigh precision"
    assert colour_of("int8+zp") in svg
    assert colour_of("e5m2") in svg


def test_the_same_block_is_drawn_the_same_way() -> None:
    assert random_block(5, 40).svg() == random_block(5, 40).svg()


def test_names_are_escaped_and_ids_are_prefixed() -> None:
    svg = small_block(NASTY).svg("a b")
    assert " ".join(NASTY.split("\n")) in boxes_of(svg)  # as XML reads an attribute
    ids = [each.get("id") for each in parsed(svg).iter() if each.get("id")]
    assert ids == ["a-b-title", "a-b-desc"]
    root = parsed(svg)
    assert (root.get("aria-labelledby"), root.get("aria-describedby")) == tuple(ids)
    description = "".join(root.find(f"{SVG}desc").itertext())  # type: ignore[union-attr]
    assert "quantize to" in description
    assert "→ 2^-3" in description


def test_boxes_lead_where_links_say() -> None:
    drawn = parsed(small_block().svg(links={"up": "#t=a&b\"", "gone": "#t=c"}))
    assert drawn.get("role") == "group"
    assert {group.get("data-node"): link.get("href") for group in drawn.iter(f"{SVG}g")
            for link in group.findall(f"{SVG}a")} == {"up": "#t=a&b\""}
    alone = parsed(small_block().svg())
    assert alone.get("role") == "img" and not list(alone.iter(f"{SVG}a"))


def test_nothing_is_loaded_from_elsewhere() -> None:
    svg = small_block().svg()
    assert re.findall(r"(?:href|src|url\(|@import)", svg) == []
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]


def test_graphviz_text_has_every_node_and_edge_once() -> None:
    dot = small_block('a"b\\').dot()
    assert dot.count(" -> ") == 5
    assert '"q" -> "a\\"b\\\\" [label="→ 2^-3"' in dot
    assert dot.count("[label=") == 5 + 3  # nodes, and edges that have one
    assert dot.startswith('digraph "layers.0: Layer, 1 of 2" {')
    assert dot.endswith("}\n")


@pytest.mark.parametrize(("scale", "text"), [
    (Scale(8.0), "2^3"), (Scale(2.0**-126), "2^-126"), (Scale(3.0), "2^1.6"),
    (Scale(0.999), "2^0.0"), (Scale(0.0), "0"), (Scale(math.inf), "inf"), (Scale(-0.5), "-2^-1"),
    (Scale(1.0, 0.5, 2.0), "2^-1…2^1"), (Scale(1.0, 1.0, 1.001), "2^0…2^0.0"),
    (Scale(1.1, 1.1, 1.1), "2^0.1"), (Scale(None, format="mxfp4"), "e2m1"),
    (Scale(None, format="e4m3"), "e4m3"), (Scale(None, format="int4[1x128]*f32+zp"), "int4")])
def test_scales_are_spelled_as_powers_of_two(scale: Scale, text: str) -> None:
    assert scale.text == text


def luminance(colour: str) -> float:
    parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055)**2.4 for part in parts]
    return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "bf16", "e5m7[row]*f32", *named_formats()])
def test_colours_of_elements_can_be_seen_on_light_and_dark(name: str) -> None:
    light = luminance(colour_of(name))
    assert 1.05 / (light + 0.05) >= 3  # against white
    assert (light + 0.05) / (luminance("#16181d") + 0.05) >= 3
    if name in named_formats():
        assert colour_of(name) == colour_of(parse(name).element.name)


def test_files_and_json(tmp_path: Path) -> None:
    block = small_block()
    assert block.save(tmp_path / "b.svg").read_text() == block.svg()
    assert block.save(tmp_path / "b.gv").read_text() == block.dot()
    with pytest.raises(ConfigError, match=r"\.svg, \.dot or \.gv, not \.png"):
        block.save(tmp_path / "b.png")
    nan = BlockEdge(source="x", target="add", forward=Scale(math.inf))
    for each in (block, Block(path="", what="", made="", meaning="", nodes=block.nodes,
                              edges=(nan,))):
        assert Block.from_dict(json.loads(json.dumps(each.to_dict(), allow_nan=False))) == each
    with pytest.raises(ConfigError, match="schema"):
        Block.from_dict({**block.to_dict(), "schema_version": 9})
    with pytest.raises(ConfigError, match="not a block"):
        Block.from_dict({**block.to_dict(), "nodes": [{"name": 1}]})


def test_lines_in_a_circle_are_refused_and_none_is_no_picture() -> None:
    with pytest.raises(ValueError, match="circle"):
        place([(1, 1), (1, 1)], [Line(0, 1), Line(1, 0)])
    assert place([], []).boxes == ()
    assert len(place([(10, 5), (10, 5)], []).boxes) == 2


@pytest.mark.parametrize("name", ["encoder-int8", "encoder-mxfp4", "training-fp8", "training-rms"])
def test_pictures_in_the_documents_are_whole(name: str) -> None:
    svg = (Path(__file__).parents[2] / "docs" / "images" / f"block-{name}.svg").read_text()
    texts = ["".join(text.itertext()) for text in parsed(svg).iter(f"{SVG}text")]
    assert any(text.startswith("→ 2^") for text in texts)
    assert any(text.startswith("← 2^") for text in texts) == name.startswith("training")
    assert len(groups(svg, "edge")) >= len(groups(svg, "node")) > 20
