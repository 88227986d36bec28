"""Small models for the passes' tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class TiedLanguageModel(nn.Module):
    """Embedding, pre-norm attention by SDPA, tied head; dict out with None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
        x = self.drop(self.embed(ids))
        q, k, v = (t[:, None] for t in self.qkv(self.norm(x)).chunk(3, -1))
        bias = None if mask is None else mask[:, None, None, :].bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)[:, 0]
        x = x + self.out(y)
        return {"logits": self.head(x), "cache": None, "hidden": (x,)}


class ConvNet(nn.Module):
    """Grouped and plain convolutions, batch norm, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.stem(image)))
        x = self.up(self.grouped(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class MLP(nn.Module):
    """Two linears that read the same value, and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 48)
        self.up = nn.Linear(64, 48, bias=False)
        self.down = nn.Linear(48, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def tied() -> TiedLanguageModel:
    torch.manual_seed(0)
    return TiedLanguageModel().eval()


@pytest.fixture
def convnet() -> ConvNet:
    torch.manual_seed(0)
    model = ConvNet().eval()
    model.bn.running_mean.uniform_(-1, 1)
    model.bn.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))
