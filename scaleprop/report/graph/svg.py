"""A block as an ``<svg>`` element: layers of boxes, with scales on the edges."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape

from scaleprop.report.graph.dot import label_lines
from scaleprop.report.graph.layout import Box, Layout, Line, Route, place
from scaleprop.report.graph.model import Block, BlockEdge, BlockNode, Scale, printable
from scaleprop.report.graph.palette import colour_of

_LETTER = 0.62  # width of a letter of a fixed-width font, in its size
_LARGE, _SMALL = 12.0, 10.0  # sizes of text
_MARGIN = 16.0
_LONGEST = 34  # letters of a box's line; a longer one loses its beginning
_HEAD = 5.0  # of an arrow
_CORNERS = {"quantize": 12.0, "dequantize": 12.0, "parameter": 0.0}
# alone, the drawing has the system's light or dark; in a page it has the page's
_STYLE = """
svg.sg:root{color-scheme:light dark;color:CanvasText;background:Canvas}
.sg text{fill:currentColor;font:10px ui-monospace,Consolas,'DejaVu Sans Mono',monospace}
.sg .sg-name{font-size:12px;font-weight:600}
.sg .sg-head{font-size:14px;font-weight:600}
.sg .sg-quiet{fill-opacity:.72}
.sg rect{fill:currentColor;fill-opacity:.05;stroke:currentColor;stroke-opacity:.55}
.sg .sg-outside{stroke:none;fill:none}
.sg .sg-parameter{stroke-dasharray:4 3}
.sg path{fill:none;stroke:currentColor;stroke-opacity:.45;stroke-width:1.2}
.sg .sg-arrow{fill:currentColor;fill-opacity:.55;stroke:none}
.sg a{color:inherit}
.sg a:hover rect{stroke-width:2.5}
.sg .sg-low{stroke-opacity:1;stroke-width:2}
.sg g:hover>path.sg-line{stroke-opacity:1;stroke-width:3}
"""


def render_block(
    block: Block, prefix: str = "block", links: Mapping[str, str] | None = None
) -> str:
    """``block`` as an ``<svg>`` element, to stand in a page or alone.

    Text is text; tooltips have the exact numbers, and why values stayed high; title and
    description say the same to who does not see it. prefix: of its ids, which a page has once.
    links: a node's name → the address that its box leads to.
    """
    drawn, links = layout_of(block), links or {}
    prefix = re.sub(r"\W", "-", prefix)
    foot = _legend(block)
    texts = ((block.title, _LARGE + 2), (block.made, _SMALL), *((text, _SMALL) for text, _ in foot))
    width = max(drawn.width, *(len(text) * size * _LETTER for text, size in texts)) + 2 * _MARGIN
    height = drawn.height + 2 * _MARGIN + 52 + 16 * len(foot)
    left = (width - drawn.width) / 2
    role = "group" if links else "img"  # links in an image are not seen by screen readers
    body = "".join((
        *(_edge(edge, route) for edge, route in zip(block.edges, drawn.routes, strict=True)),
        *(_node(node, box, links.get(node.name))
          for node, box in zip(block.nodes, drawn.boxes, strict=True))))
    return printable(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sg" role="{role}" viewBox="0 0 '
        f'{width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'aria-labelledby="{prefix}-title" aria-describedby="{prefix}-desc" '
        f'style="max-width:100%;height:auto">'
        f'<title id="{prefix}-title">{escape(block.title)}</title>'
        f'<desc id="{prefix}-desc">{escape(_description(block))}</desc>'
        f"<style>{_STYLE}</style>"
        f'<text class="sg-head" x="{_MARGIN:.0f}" y="26">{escape(block.title)}</text>'
        f'<text class="sg-quiet" x="{_MARGIN:.0f}" y="42">{escape(block.made)}</text>'
        f'<g transform="translate({left:.1f} {_MARGIN + 44:.0f})">{body}</g>\n'
        f"{_drawn_legend(foot, height)}</svg>\n")


def _size(node: BlockNode) -> tuple[float, float]:
    lines = _texts(node)
    wide = max(len(text) * size * _LETTER for text, size in lines)
    return wide + 18.0, 9.0 + 15.0 * len(lines)


def _texts(node: BlockNode) -> list[tuple[str, float]]:
    """The lines of a box, with their sizes."""
    below = [node.module] if node.kind not in ("quantize", "dequantize") else []
    if node.format and node.kind != "operator":
        below.append(node.format)
    return [(_shortened(node.label), _LARGE),
            *((_shortened(text), _SMALL) for text in below if text)]


def _shortened(text: str) -> str:
    """The end of a path, which tells it from others."""
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST:]


def _label_size(edge: BlockEdge) -> tuple[float, float]:
    lines = label_lines(edge)
    return max((len(line) * _SMALL * _LETTER for line in lines), default=0.0), 13.0 * len(lines)


def _node(node: BlockNode, box: Box, link: str | None) -> str:
    kind = {"input": " class=\"sg-outside\"", "output": " class=\"sg-outside\"",
            "parameter": " class=\"sg-parameter\""}.get(node.kind, "")
    colour = f' style="stroke:{colour_of(node.format)};fill:{colour_of(node.format)};' \
             'stroke-opacity:1;fill-opacity:.14"' if node.format else ""
    texts = _texts(node)
    top = box.y - box.height / 2
    written = "".join(
        f'<text class="{"sg-name" if size == _LARGE else "sg-quiet"}" x="{box.x:.1f}" '
        f'y="{top + 16 + 15 * line:.1f}" text-anchor="middle">{escape(text)}</text>'
        for line, (text, size) in enumerate(texts))
    body = (f'<rect{kind}{colour} x="{box.x - box.width / 2:.1f}" y="{top:.1f}" '
            f'width="{box.width:.1f}" height="{box.height:.1f}" '
            f'rx="{_CORNERS.get(node.kind, 4.0):g}"/>{written}')
    if link is not None:
        body = f'<a href="{escape(link)}">{body}</a>'
    return (f'\n<g class="sg-node" data-node="{escape(node.name)}">'
            f"<title>{escape(_tooltip(node))}</title>{body}</g>")


def _tooltip(node: BlockNode) -> str:
    return "\n".join(part for part in (node.label, node.module, node.format, node.detail) if part)


def _edge(edge: BlockEdge, route: Route) -> str:
    line = f'<path class="{_kind(edge.forward)}"{_stroke(edge.forward)} d="{_course(route)}"/>'
    x, y = route.points[-1]
    fill = f' style="fill:{colour_of(edge.forward.format)};fill-opacity:1"' \
        if edge.forward is not None and edge.forward.format else ""
    head = (f'<path class="sg-arrow"{fill} d="M{x - _HEAD / 1.4:.1f} {y - _HEAD * 1.6:.1f}h'
            f'{_HEAD * 1.43:.1f}L{x:.1f} {y:.1f}z"/>')
    return (f'\n<g class="sg-edge" data-source="{escape(edge.source)}" '
            f'data-target="{escape(edge.target)}"><title>{escape(_sentence(edge))}</title>'
            f"{line}{head}{_written(edge, route)}</g>")


def _kind(scale: Scale | None) -> str:
    return "sg-line sg-low" if scale is not None and scale.format else "sg-line"


def _stroke(scale: Scale | None) -> str:
    return f' style="stroke:{colour_of(scale.format)}"' \
        if scale is not None and scale.format else ""


def _course(route: Route) -> str:
    """Vertical and bent pieces in turn; the last one ends where the arrow's head begins."""
    (x, y), *rest = route.points
    parts = [f"M{x:.1f} {y:.1f}"]
    for number, (to_x, to_y) in enumerate(rest):
        if number % 2 == 0:
            end = to_y - _HEAD * 1.2 if number == len(rest) - 1 else to_y
            if abs(end - y) > 0.05:
                parts.append(f"V{end:.1f}")
        elif abs(to_x - x) < 0.05:
            parts.append(f"V{to_y:.1f}")
        else:
            middle = (y + to_y) / 2
            parts.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}")
        x, y = to_x, to_y
    return "".join(parts)


def _written(edge: BlockEdge, route: Route) -> str:
    if route.label is None:
        return ""
    box = route.label
    scales = [scale for scale in (edge.forward, edge.backward) if scale is not None]
    return "".join(
        f'<text x="{box.x - box.width / 2:.1f}" '
        f'y="{box.y - box.height / 2 + 10 + 13 * line:.1f}">{_arrow(text, scale)}</text>'
        for line, (text, scale) in enumerate(zip(label_lines(edge), scales, strict=True)))


def _arrow(text: str, scale: Scale) -> str:
    """A line of a label, its arrow in the format's colour."""
    if not scale.format:
        return escape(text)
    # mixed with that of text: alone it is readable as a line, not as a letter
    colour = f"color-mix(in srgb,{colour_of(scale.format)} 75%,currentColor)"
    return f'<tspan style="fill:{colour};font-weight:700">{text[0]}</tspan>{escape(text[1:])}'


def _sentence(edge: BlockEdge) -> str:
    label = ", ".join(label_lines(edge))
    named = f"{edge.source} to {edge.target}{': ' if label else ''}{label}"
    return f"{named}\n{edge.detail}" if edge.detail else named


def _description(block: Block) -> str:
    """What the picture shows, in words."""
    what = {node.name: f"{node.label} {node.module}".strip() for node in block.nodes}
    edges = "; ".join(
        f"{what[edge.source]} to {what[edge.target]}"
        + (f" ({', '.join(label_lines(edge))})" if label_lines(edge) else "")
        for edge in block.edges)
    return f"{block.meaning}. Edges: {edges}."


def _legend(block: Block) -> list[tuple[str, str]]:
    """Lines below the picture: text, and the colour that it explains."""
    scales = [scale for edge in block.edges for scale in (edge.forward, edge.backward)]
    formats = [scale.format for scale in scales if scale is not None and scale.format]
    formats += [node.format for node in block.nodes if node.format]
    found: dict[str, str] = {}
    for name in formats:
        found.setdefault(Scale(None, format=name).element, colour_of(name))
    wrapped = [(line, "") for text in (block.meaning, *block.notes)
               for line in textwrap.wrap(text, 88)]
    return [*sorted(found.items()), *wrapped]


def _drawn_legend(lines: Sequence[tuple[str, str]], height: float) -> str:
    top = height - _MARGIN - 16 * (len(lines) - 1)
    parts: list[str] = []
    for number, (text, colour) in enumerate(lines):
        y = top + 16 * number
        if colour:
            parts.append(f'<path class="sg-low" style="stroke:{colour}" '
                         f'd="M{_MARGIN:.0f} {y - 3.5:.1f}h24"/>')
        x = _MARGIN + (30 if colour else 0)
        parts.append(f'<text class="sg-quiet" x="{x:.0f}" y="{y:.1f}">{escape(text)}</text>')
    return "".join(parts)


def layout_of(block: Block) -> Layout:
    """Where ``render_block`` puts boxes, edges and labels."""
    numbers = {node.name: number for number, node in enumerate(block.nodes)}
    return place([_size(node) for node in block.nodes],
                 [Line(numbers[edge.source], numbers[edge.target], _label_size(edge))
                  for edge in block.edges])
