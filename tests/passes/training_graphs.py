"""Small models of training steps, their joint graphs, and what lowering makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from scaleprop.backends.graphs import compile_joint
from scaleprop.passes.training import Formats, Lowered, lower_products

ONE = torch.ones(())  # the gradient of a loss


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, out: int = 8, bias: bool = True) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(16, 32, bias=False), act
        self.down = nn.Linear(32, out, bias)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x).square().mean()


class Attention(nn.Module):
    """Eager attention: products of activations beside those of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.q(x) @ self.k(x).mT).softmax(-1).sum()


class Batched(nn.Module):
    """A product with a parameter for each member of the batch, as of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight)


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.first, self.last = (nn.Parameter(torch.ones(8)), nn.Linear(8, 8),
                                            nn.Linear(8, 8))  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        return self.last(x).square().mean()


def joint_of(
    model: nn.Module, *inputs: torch.Tensor, use: Callable[[Any, Any, Any], Any]
) -> list[Any]:
    """What ``use(joint, parameters, values)`` says of a model's joint graph, run in eager mode."""
    torch._dynamo.reset()
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        def transform(joint: torch.fx.GraphModule) -> None:
            places = joint.graph.find_nodes(op="placeholder")
            parameters = [node for node, value in zip(places, given, strict=False)
                          if isinstance(value, nn.Parameter)]
            found.append(use(joint, parameters, [*given, ONE]))

        return compile_joint(graph, given, transform, "eager")

    torch.compile(model, backend=backend, fullgraph=True)(*inputs).sum().backward()
    return found


def lowered(model: nn.Module, *inputs: torch.Tensor, formats: Formats | None = None) -> Lowered:
    return joint_of(model, *inputs, use=lambda joint, parameters, values: lower_products(
        joint, parameters, formats or Formats(), values))[0]


def trained(model: nn.Module, *inputs: torch.Tensor, formats: Formats) -> list[torch.Tensor]:
    """What a model returns, and the gradients of its parameters, lowered."""
    model.zero_grad()
    tangent = ONE.to(next(model.parameters()).dtype)

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        def transform(joint: torch.fx.GraphModule) -> None:
            places = joint.graph.find_nodes(op="placeholder")
            parameters = [node for node, value in zip(places, given, strict=False)
                          if isinstance(value, nn.Parameter)]
            lower_products(joint, parameters, formats, [*given, tangent])

        return compile_joint(graph, given, transform, "eager")

    torch._dynamo.reset()
    result = torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    result.backward()
    learned = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [result.detach(), *learned]
