"""Training steps of small models, and joint graphs whose values are held at random exponents."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop.backends.graphs import compile_joint
from scaleprop.passes.exponents import Carried, carry, has_scale


class Anywhere:
    """A random exponent on every value of a graph; ``carried`` notes what became of each graph."""

    def __init__(self, seed: int = 1, low: int = -6, high: int = 6) -> None:
        self.seed, self.low, self.high = seed, low, high
        self.carried: list[Carried] = []

    def __call__(self, joint: torch.fx.GraphModule) -> None:
        draw = random.Random(self.seed)
        wanted = {node: draw.randint(self.low, self.high) for node in joint.graph.nodes
                  if has_scale(node)}
        self.carried.append(carry(joint, wanted))


def nothing(joint: torch.fx.GraphModule) -> None:
    """The graph as PyTorch traced it."""


def compiled(
    model: Any, transform: Callable[[torch.fx.GraphModule], None], inner: Any = "eager",
    **options: Any,
) -> Any:
    """``torch.compile`` with ``transform`` applied to each joint graph."""
    return torch.compile(
        model, backend=lambda graph, given: compile_joint(graph, given, transform, inner),
        **options)


def loss_of(result: Any) -> torch.Tensor:
    """A scalar: what the model returned, or the weighted mean square of all its floats."""
    leaves = [leaf for leaf in pytree.tree_leaves(result)
              if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if len(leaves) == 1 and leaves[0].ndim == 0:
        return leaves[0]
    return sum((place + 1) * leaf.square().mean() for place, leaf in enumerate(leaves))  # type: ignore[return-value]


def step(model: Any, *inputs: Any, seed: int = 0) -> list[torch.Tensor]:
    """Loss, and the gradients of parameters and of inputs that want one."""
    torch.manual_seed(seed)
    model.zero_grad()
    wanting = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    for x in wanting:
        x.grad = None
    loss = loss_of(model(*inputs))
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *(t.grad.clone() for t in (*learned, *wanting) if t.grad is not None)]


def assert_parallel(
    got: Sequence[torch.Tensor], want: Sequence[torch.Tensor],
    turned: float = 1e-10, stretched: float = 1e-10,
) -> None:
    """Every tensor points where the other does, and is as long."""
    assert len(got) == len(want)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.isfinite().all(), place
        if not b.any():
            assert not a.any(), place
            continue
        x, y = a.double().flatten(), b.double().flatten()
        assert 1 - torch.cosine_similarity(x, y, dim=0) <= turned, place
        assert abs(x.norm() / y.norm() - 1) <= stretched, place


def assert_equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    """Every bit."""
    assert len(got) == len(want)
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.isfinite().all() and torch.equal(a, b), place
