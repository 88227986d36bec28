"""A small language model, and outliers planted in it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, TOKENS = 64, 32


class Layer(nn.Module):
    """Attention, fused or spelled out, and a feed-forward; both before a norm."""

    def __init__(self, fused: bool, causal: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fused, self.causal = fused, causal

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores + torch.full((x.shape[1],) * 2, -1e4).triu(1)
        return scores.softmax(-1) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(self.attend(self.first(x)).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.second(x))))


class Model(nn.Module):
    """Embedding, two layers, a norm and a head."""

    def __init__(self, fused: bool = True, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(96, WIDTH)
        self.layers = nn.ModuleList(Layer(fused, causal) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 96, bias=False)
        self.eval().requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batches(start: int | None = None) -> list[torch.Tensor]:
    """Three batches of two sequences of tokens 1 … 95; all start with ``start`` where given."""
    generator = torch.Generator().manual_seed(1)
    found = [torch.randint(1, 96, (2, TOKENS), generator=generator) for _ in range(3)]
    for batch in found:
        if start is not None:
            batch[:, 0] = start
    return found


def plant_sink(model: Model) -> None:
    """Token 0 has a feature of its own, which keys of the second layer answer to and values not."""
    model.table.weight[:, 3] = 0
    model.table.weight[0] = 0
    model.table.weight[0, 3] = 30
    second = model.layers[1]
    second.k.weight[:, 3] = 4
    second.q.bias.fill_(2.0)
    second.v.weight[:, 3] = 0
    second.v.bias.zero_()
