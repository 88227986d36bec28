"""Pictures of blocks on a page: a box leads to its tensor, where the page has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from scaleprop.report.graph.model import Block
from scaleprop.report.page import Section
from scaleprop.report.records import TensorRecord
from scaleprop.report.tensors_html import fragment

Drawn = tuple[Block, Mapping[str, str]]  # a block; its nodes' names → addresses


def block_section(blocks: Sequence[Drawn]) -> Section:
    """The pictures, each in a box of its own that scrolls; nothing where there are none."""
    body = "".join(
        f'<div class="scroll fit block" tabindex="0" role="region" '
        f'aria-label="{escape(block.title)}, {escape(block.made)}">\n'
        f"{_inline(block.svg(f'block-{number}', links))}</div>\n"
        for number, (block, links) in enumerate(blocks))
    return Section("block", "One block, with scales on its edges", body)


def _inline(svg: str) -> str:
    """``svg`` as a part of HTML, which needs no namespace: the page names no address at all."""
    return svg.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)


def with_records(block: Block, records: Sequence[TensorRecord], slugs: Sequence[str],
                 values: Mapping[str, str]) -> Drawn:
    """``block`` of a compiled model: stored weights and quantizations lead to the operand that
    their reader has of them, operators to the value that they make (``values``, name → slug)."""
    found: dict[tuple[str, bool], list[str]] = {}
    for record, slug in zip(records, slugs, strict=True):
        if record.format is not None:
            found.setdefault((record.node, record.scale_kind == "weight"), []).append(slug)
    kinds = {node.name: node.kind for node in block.nodes}
    links = with_values(block, values)[1]
    for edge in block.edges:
        kind = kinds[edge.source]
        operands = found.get((edge.target, kind == "parameter"), [])
        if kind in ("parameter", "quantize") and len(operands) == 1:  # of several, any might be it
            links = {**links, edge.source: fragment(operands[0])}
    return block, links


def with_values(block: Block, values: Mapping[str, str]) -> Drawn:
    """``block``, each box leading to the value of its name (``values``, name → slug)."""
    return block, {node.name: fragment(values[node.name]) for node in block.nodes
                   if node.name in values}
