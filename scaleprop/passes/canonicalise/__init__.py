"""Canonicalise: bring operators that mean the same to one spelling, found by structure.

Every rewrite keeps the function; a match that fails says why at DEBUG level.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from scaleprop.passes.base import Pass, PassResult, Program
from scaleprop.passes.canonicalise import attention, convolutions, linears, norms, scaled
from scaleprop.passes.rewrite import Rewriter


@dataclasses.dataclass(frozen=True)
class Canonicalise(Pass):
    """Find linears, norms, convolutions, embeddings and attention by structure.

    linears, norms, convolutions, attention, scaled: switch each group of rewrites.
    """

    linears: bool = True
    norms: bool = True
    convolutions: bool = True
    attention: bool = True
    scaled: bool = True

    name: ClassVar[str] = "canonicalise"
    preserves_function: ClassVar[bool] = True
    one_by_one: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        """The same function in canonical operators."""
        rewriter = Rewriter(program, self.name)
        notes: list[str] = []
        groups = {
            "linears": (self.linears, linears.rewrite),
            "norms": (self.norms, norms.rewrite),
            "convolutions": (self.convolutions, convolutions.rewrite),
            "attention": (self.attention, attention.label),
            "scaled operators": (self.scaled, scaled.rewrite),
        }
        for group, (enabled, rewrite) in groups.items():
            count = rewrite(rewriter) if enabled else 0
            if count:
                notes.append(f"{count} {group}")
        return PassResult(rewriter.finish(), rewriter.modified, tuple(notes))
