"""A solved weight on its way from the pass that solves to the one that stores."""

from __future__ import annotations

import torch.fx

from scaleprop.formats import ScaledTensor

SOLVED = "scaleprop.solved"  # the key in node.meta


def solved_of(node: torch.fx.Node) -> ScaledTensor | None:
    """The weight that was solved for ``node``: its codes and scales are stored as they are."""
    return node.meta.get(SOLVED)
