"""Models that once were transformed wrongly: every kind, of everything that they compute."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.passes.base import PassManager, relative_error, run_as_is, widened
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.rewrite import Rewriter
from scaleprop.passes.transforms.apply import apply
from scaleprop.passes.transforms.region import find_region
from scaleprop.passes.transforms.transform import (
    Centre,
    Permute,
    Rotate,
    Scale,
    Shift,
    random_rotation,
)
from tests.passes.transforms.toys import shuffled

KINDS = ("scale", "shift", "permute", "rotate", "centre")
ROWS, PICTURE = (3, 6, 8), (2, 8, 4, 4)


class Layers(nn.Module):
    """What all of the models below are made of."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.small, self.wide, self.rows = nn.Linear(4, 4), nn.Linear(16, 4), nn.Linear(8, 6)
        self.gain = nn.Parameter(torch.ones(8))
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.depth, self.merge = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(16, 3, 1)
        self.norm, self.flat = nn.BatchNorm2d(8), nn.Linear(128, 2)
        self.ring = nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular")
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def skip(m, x):
    h = F.relu(m.first(x))
    low = F.relu(m.second(F.max_pool2d(h, 2)))
    return m.merge(torch.cat([h, F.interpolate(low, scale_factor=2)], 1))


def dense(m, x):
    h = m.a(x)
    return m.wide(torch.cat([h, m.b(h)], -1))


def halves(m, x):
    first, second = F.layer_norm(x, (8,), m.gain).chunk(2, -1)
    return m.b(torch.cat([first, second * m.gain[:4] + m.small(first)], -1))


def normalised(m, x):
    h = m.first(x)
    return m.merge(torch.cat([h, m.norm(h)], 1))


def depthwise(m, x):
    h = m.first(x)
    return m.merge(torch.cat([h, m.depth(h)], 1))


def outer(m, x):
    h = m.a(x)
    return m.b(h.unsqueeze(-1) * h.unsqueeze(-2)).sum(-1) + m.c(h)


def gram(m, x):
    h = m.a(x)
    return m.b(h.mT @ h).sum() + m.c(h)


def unbatched(m, x):
    h = m.a(x[0]).mT.expand(8, 8, 6).permute(0, 1, 2)
    return m.second(F.avg_pool2d(F.relu(m.second(h)), 1))


def own_mask(m, x):
    h = m.a(x)
    return m.b(torch.where(h > 0, m.gain, 2 * m.gain)) + m.c(h)


def scores_from_values(m, x):
    h = m.rows(x)
    q, k, v = m.a(x), m.b(x), m.c(x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=h), F.relu(h)


def mixed_tokens(m, x):
    q, k = m.a(x), F.linear(m.b(x).mT, m.rows.weight[:, :6]).mT
    return F.scaled_dot_product_attention(q, k, m.c(k))


def vector(m, x):
    return F.linear(m.a(x), m.gain) + m.b(x).sum(-1)


def two_axes(m, x):
    return m.b(F.layer_norm(m.a(x), (6, 8)))


def per_channel_rows(m, x):
    index = torch.arange(18 * 8).reshape(18, 8) * 7 % 5
    return m.b(torch.zeros(5, 8, dtype=x.dtype).scatter_add(0, index, m.a(x).reshape(18, 8)))


def same_value_put(m, x):
    h = m.a(x).reshape(18, 8)
    return m.b(h.index_put((torch.arange(4),), m.gain[:1].reshape(1, 1).expand(4, 1)))


def one_head_of_keys(m, x):
    q = m.a(x).view(3, 6, 4, 2).transpose(1, 2)
    k, v = m.b(x)[:, None, :, :2], m.c(x)[:, None, :, :2]
    y = (q @ k.mT).softmax(-1) @ v
    return m.a(y.transpose(1, 2).reshape(3, 6, 8))


def viewed(m, x):
    h = m.a(x)
    return m.b(h.unsqueeze(2).view(3, 48)[:, :8]) + m.c(h).sum(1)


def counted(m, x):
    h = m.a(x)
    return m.b(h * (m.c(x) > 0).long())


def flat(m, x):
    return m.flat(m.norm(m.first(x)).flatten(1))


def around(m, x):
    return m.ring(F.relu(m.first(x)))


MODELS = {
    **{f.__name__: (f, PICTURE) for f in (skip, normalised, depthwise, flat, around)},
    **{f.__name__: (f, ROWS) for f in (
        dense, halves, outer, gram, unbatched, own_mask, scores_from_values, mixed_tokens, vector,
        two_axes, per_channel_rows, same_value_put, one_head_of_keys, viewed, counted)},
}  # fmt: skip


@functools.cache
def program(name):
    forward, shape = MODELS[name]
    inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(2)),)
    captured = capture(shuffled(Layers(forward)), inputs, {}, None)
    plain = widened(PassManager([CleanUp(), Canonicalise()]).run(captured))
    return plain, outputs(plain)


def outputs(of):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(run_as_is(of))
            if isinstance(leaf, torch.Tensor)]  # fmt: skip


def places(graph):
    """(value, axis) of every float with several channels there."""
    return [(node, axis) for node in graph.nodes for axis in (-1, 1)
            if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
            and node.meta["val"].is_floating_point() and node.meta["val"].ndim > 1
            and isinstance(node.meta["val"].shape[axis], int)
            and node.meta["val"].shape[axis] > 1]  # fmt: skip


def transform(region, generator):
    root = torch.from_numpy(region.channels.representative[0])
    numbers = torch.randn(region.size, generator=generator, dtype=torch.float64)
    if region.kind == "scale":
        return Scale(region.shared(numbers.exp()))
    if region.kind == "shift":
        return Shift(numbers[root])
    if region.kind == "permute":
        return Permute(torch.randperm(region.block, generator=generator))
    if region.kind == "centre":
        return Centre(region.block)
    return Rotate(random_rotation(region.block, generator).matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_transform_of_everything_keeps_the_function(name, kind):
    plain, expected = program(name)
    generator = torch.Generator().manual_seed(5)
    for place in range(len(places(plain.module.graph))):
        rewriter = Rewriter(plain, "test")
        value, axis = places(rewriter.graph)[place]
        region = find_region(value, kind, axes=(axis,))
        if kind == "centre" and not region.is_free:
            continue  # it has no inverse
        apply(rewriter, region, transform(region, generator), "test")
        changed = rewriter.finish()
        changed.module.recompile()
        found = max(relative_error(got, want)
                    for got, want in zip(outputs(changed), expected, strict=True))
        assert found < 1e-11, (value, axis, [str(cut) for cut in region.cuts])


def test_a_skip_connection_costs_nothing():
    rewriter = Rewriter(program("skip")[0], "test")
    joined = next(node for node in rewriter.graph.nodes if "aten.cat" in str(node.target))
    region = find_region(joined, "scale", axes=(1,))
    second = [item for item in region.absorbed if "second.weight" in str(item.operand)]
    assert region.is_free and len(second) <= 2
    assert len(set(region.channels.representative[0].tolist())) == 16  # no two channels are one


def test_both_sides_of_a_weight_rotate():
    rewriter = Rewriter(program("dense")[0], "test")
    joined = next(node for node in rewriter.graph.nodes if "aten.cat" in str(node.target))
    assert find_region(joined, "rotate", block=8).is_free
