"""Small models for transforms: each has something that a transform must get right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS = 16, 4, 5


def shuffled(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer random, norms' gains and biases too; variances stay positive."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator) * 0.4
            value = value.abs() + 0.5 if "var" in name else value
            value = value + 1 if tensor.ndim == 1 and "weight" in name else value
            tensor.data.copy_(value)
    return module.eval()


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [B, H, T, D]."""
    length, size = x.shape[-2:]
    angle = torch.arange(length)[:, None] * (0.7 ** torch.arange(size // 2))[None]
    angle = torch.cat([angle, angle], -1).to(x.dtype)
    first, second = x[..., : size // 2], x[..., size // 2 :]
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.rms_norm(x, (WIDTH,), self.gain, 1e-6)


class Quirk(nn.Module):
    """A decoder nobody would name so: grouped heads, rotary positions, tied table, gated product.

    The attention and the product read one norm each, side by side, and join the stream together.
    """

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        kv = HEADS // 2 * (WIDTH // HEADS)
        self.zebra = nn.Embedding(11, WIDTH)
        self.n1, self.n2, self.n3 = Rms(), Rms(), Rms()
        self.ask = nn.Linear(WIDTH, WIDTH, bias=False)
        self.both = nn.Linear(WIDTH, 2 * kv)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.gu = nn.Linear(WIDTH, 64, bias=False)
        self.dn = nn.Linear(32, WIDTH, bias=False)
        self.knob = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(WIDTH, 11, bias=False)
        if tied:
            self.out.weight = self.zebra.weight

    def attend(self, x):
        size = WIDTH // HEADS
        q = self.ask(x).unflatten(-1, (HEADS, size)).transpose(1, 2)
        k, v = self.both(x).chunk(2, -1)
        k = k.unflatten(-1, (-1, size)).transpose(1, 2).repeat_interleave(2, 1)
        v = v.unflatten(-1, (-1, size)).transpose(1, 2).repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
        return self.mix(y.transpose(1, 2).flatten(2))

    def forward(self, ids):
        x = self.zebra(ids)
        gate, up = self.gu(self.n2(x)).chunk(2, -1)
        x = x + self.attend(self.n1(x)) + torch.tanh(self.knob) * self.dn(F.silu(gate) * up)
        return self.out(self.n3(x))


class After(nn.Module):
    """Norms after the sums, with biases; softmax spelled out; a gate of its own on the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(6, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.valve = nn.Linear(WIDTH, 1)

    def forward(self, x):
        x = self.inp(x)
        size = WIDTH // HEADS
        q, k, v = (part(x).unflatten(-1, (HEADS, size)).transpose(1, 2)
                   for part in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(size), -1)
        x = self.one(x + self.o((weights @ v).transpose(1, 2).flatten(2)))
        return self.two(x + torch.sigmoid(self.valve(x)) * self.b(F.gelu(self.a(x))))


class Before(nn.Module):
    """Layer norms before, a position table, two fused projections, ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(11, WIDTH), nn.Parameter(torch.zeros(TOKENS, WIDTH))
        self.ln1, self.ln2, self.ln3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.tok(ids) + self.pos
        parts = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.relu(self.up(self.ln2(x))))
        return self.head(self.ln3(x).mean(1))


class Picture(nn.Module):
    """Convolutions with batch norms, a depthwise one, a shortcut, pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c1, self.n1 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.n2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.c3 = nn.Conv2d(8, 12, 1)
        self.short = nn.Conv2d(8, 12, 1)
        self.last = nn.Linear(12, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.n0(self.stem(x))), 2)
        y = F.relu(self.n1(self.c1(x)))
        y = F.relu(self.n2(self.deep(y)))
        x = F.relu(self.c3(y) + self.short(x))
        return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Normed(nn.Module):
    """Queries and keys are normalised, then turned: a rotary pair shares a scale, not a gain."""

    def __init__(self) -> None:
        super().__init__()
        size = WIDTH // HEADS
        self.inp, self.out = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.nq, self.nk = nn.RMSNorm(size), nn.RMSNorm(size)

    def forward(self, x):
        x = self.inp(x)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for part in self.qkv(x).split(WIDTH, -1))
        y = F.scaled_dot_product_attention(turned(self.nq(q)), turned(self.nk(k)), v)
        return self.out(x + y.transpose(1, 2).flatten(2))


class Crossing(nn.Module):
    """An encoder and a decoder: what one writes the other reads through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(11, WIDTH), nn.Embedding(11, WIDTH)
        self.ln, self.rn, self.en = (Rms() for _ in range(3))
        self.write = nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.head = nn.Linear(WIDTH, 11, bias=False)

    def forward(self, source, target):
        memory = self.left(source)
        memory = self.en(memory + self.write(self.ln(memory)))
        x = self.right(target)
        size = WIDTH // HEADS
        q = self.q(self.rn(x)).unflatten(-1, (HEADS, size)).transpose(1, 2)
        k, v = (part(memory).unflatten(-1, (HEADS, size)).transpose(1, 2)
                for part in (self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


TOYS: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {
    "quirk": (Quirk, (ids(),)),
    "untied": (lambda: Quirk(tied=False), (ids(),)),
    "after": (After, (floats(2, TOKENS, 6),)),
    "before": (Before, (ids(),)),
    "picture": (Picture, (floats(2, 3, 8, 8),)),
    "normed": (Normed, (floats(2, TOKENS, 6),)),
    "crossing": (Crossing, (ids(), ids(1))),
}
