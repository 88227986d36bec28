"""A block in GraphViz's language, for those who have ``dot`` and want its layout."""

from __future__ import annotations

from scaleprop.report.graph.model import Block, BlockEdge, BlockNode, printable
from scaleprop.report.graph.palette import colour_of

_SHAPES = {"quantize": "cds", "dequantize": "cds", "parameter": "note", "input": "plaintext",
           "output": "plaintext", "module": "component"}


def to_dot(block: Block) -> str:
    """The block as a ``digraph``. Every name in it is quoted."""
    lines = [f"digraph {_quoted(block.title)} {{",
             f"  label={_quoted(block.title + chr(10) + block.meaning)}; labelloc=t;",
             '  node [shape=box, fontname="monospace", fontsize=11];',
             '  edge [fontname="monospace", fontsize=10, color="#808080"];',
             *map(_node, block.nodes), *map(_edge, block.edges), "}"]
    return "\n".join(lines) + "\n"


def _node(node: BlockNode) -> str:
    label = "\n".join(part for part in (node.label, node.module, node.format) if part)
    given = {"label": label, "shape": _SHAPES.get(node.kind, "box"), "tooltip": node.detail}
    if node.format:
        given["color"] = colour_of(node.format)
    return f"  {_quoted(node.name)} [{_attributes(given)}];"


def _edge(edge: BlockEdge) -> str:
    given = {"label": "\n".join(label_lines(edge)), "tooltip": edge.detail}
    if edge.forward is not None and edge.forward.format:
        given["color"] = colour_of(edge.forward.format)
    return f"  {_quoted(edge.source)} -> {_quoted(edge.target)} [{_attributes(given)}];"


def label_lines(edge: BlockEdge) -> list[str]:
    """``→ 2^3`` and ``← 2^-7``, as far as they are known."""
    return [f"{arrow} {scale.text}" for arrow, scale in (("→", edge.forward), ("←", edge.backward))
            if scale is not None]


def _attributes(given: dict[str, str]) -> str:
    return ", ".join(f"{name}={_quoted(value)}" for name, value in given.items() if value)


def _quoted(text: str) -> str:
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
