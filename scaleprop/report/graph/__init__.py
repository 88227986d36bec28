"""Pictures of one block of a model: what reads what, with scales on the edges."""

from scaleprop.report.graph.model import Block, BlockEdge, BlockNode, Scale, check_suffix
from scaleprop.report.graph.svg import render_block

__all__ = ["Block", "BlockEdge", "BlockNode", "Scale", "check_suffix", "render_block"]
