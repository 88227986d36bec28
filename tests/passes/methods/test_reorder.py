"""Reorder: orders against the least error of four, in loops; what is free; what it gains."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError, PassError
from scaleprop.formats import fake_quantize
from scaleprop.passes.methods.reorder import Reorder
from scaleprop.passes.methods.smooth import Smooth
from scaleprop.passes.transforms.base import Work
from scaleprop.passes.transforms.search import OutputError
from scaleprop.recipes.base import Recipe, Role
from tests.passes.methods.small import parameter, prepared

SIZE, HEADS = 64, 4
HOT = [1, 9, 17, 25, 33, 41, 49, 57]  # one in each block of 8
BLOCKS = "e2m1[1x8]*e8m0"
RECIPE = Recipe(name="r", description="", roles={"fprop.w": Role(format=BLOCKS),
                                                 "fprop.x": Role(format=BLOCKS)})  # fmt: skip


class Gated(nn.Module):
    """gate·up→down: hidden channels have any order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """A tied table, grouped attention with rotary embeddings, gate·up→down; norms before both."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, SIZE)
        self.first, self.second, self.last = (nn.RMSNorm(SIZE) for _ in range(3))
        self.q, self.k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE // 2)
        self.v, self.o = nn.Linear(SIZE, SIZE // 2), nn.Linear(SIZE, SIZE, bias=False)
        self.gate, self.up = nn.Linear(SIZE, 96), nn.Linear(SIZE, 96)
        self.down = nn.Linear(96, SIZE)
        self.register_buffer("speeds", 100.0 ** -(torch.arange(8) / 8))

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[2])[:, None] * self.speeds
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        left, right = x[..., :8], x[..., 8:]
        return x * cos + torch.cat([-right, left], -1) * sin

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.first(x)
        q, k, v = (f(h).unflatten(-1, (-1, 16)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.second(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        return F.linear(self.last(x), self.table.weight)


def decoder() -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    model, ids = Decoder().eval(), torch.randint(0, 40, (4, 12))
    with torch.no_grad():
        for norm in (model.first, model.second, model.last):
            norm.weight.copy_(torch.rand(SIZE) + 0.5)
            norm.weight[HOT] *= 20
        for layer in (model.q, model.k, model.v, model.gate, model.up):
            layer.weight[:, HOT] /= 10
        spread = torch.logspace(0, 1.5, 16)[torch.randperm(16)]
        model.v.weight.mul_(spread.repeat(2)[:, None])
        model.o.weight.div_(spread.repeat(HEADS))
    return model, ids


def test_hidden_channels_come_in_the_best_of_four_orders():
    torch.manual_seed(1)
    model, x = Gated().eval(), torch.randn(40, 16)
    with torch.no_grad():
        model.up.weight.mul_(torch.logspace(0, 2, 32)[torch.randperm(32)][:, None])
        model.down.weight.div_(torch.logspace(0, 1.5, 32)[torch.randperm(32)])
    hidden = (F.silu(model.gate(x)) * model.up(x)).detach()
    weight = model.down.weight.detach()
    inputs, outer = hidden.abs().amax(0), weight.abs().amax(0)
    errors = {}
    for score in (inputs, outer, inputs * outer, hidden.abs().mean(0), -torch.arange(32.0)):
        order = sorted(range(32), key=lambda j: -float(score[j]))
        y, v = hidden[:, order], weight[:, order]
        got = fake_quantize(y, BLOCKS) @ fake_quantize(v, BLOCKS).mT
        errors[tuple(order)] = float((got - y @ v.mT).square().sum())
    order = list(min(errors, key=lambda item: errors[item]))
    assert order != list(range(32))
    found = Reorder().run(prepared(model, x, RECIPE)).program
    assert torch.equal(parameter(found, "down.weight"), weight[:, order])
    for name in ("gate.weight", "up.weight", "gate.bias", "up.bias"):
        assert torch.equal(parameter(found, name), model.state_dict()[name][order])


@pytest.mark.parametrize("options", ["", "{keys=true}"])
def test_the_function_is_kept_at_no_cost(options):
    model, ids = decoder()
    compiled = scaleprop.compile(model, ids, RECIPE, "reference", calibration=[ids],
                                 passes=[f"reorder{options}"], verify=True)
    applied = [item for item in compiled.program.transforms if item.refused is None]
    assert len(applied) == (4 if options else 3) and all(not item.runtime for item in applied)
    assert any("speeds" in item.absorbed for item in applied) == bool(options)
    stream = next(item.absorbed for item in applied if "last.weight" in item.absorbed)
    assert {"table.weight", "o.weight", "down.bias", "gate.weight"} < set(stream)


def test_outliers_in_every_block_come_together():
    model, ids = decoder()
    want = model(ids)
    error = [float((scaleprop.compile(model, ids, RECIPE, "reference", calibration=[ids],
                                      passes=passes)(ids) - want).norm() / want.norm())
             for passes in ([], ["reorder"])]  # fmt: skip
    assert error[1] < 0.8 * error[0]


def test_keys_are_sorted_by_the_rows_of_their_projection():
    model, ids = decoder()
    with torch.no_grad():
        outliers = torch.tensor([1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 8.0, 1.0])  # one in each block of 4
        model.k.weight.mul_(outliers.repeat(4)[:, None])
    found = Reorder(keys=True).run(prepared(model, ids, RECIPE)).program
    rows = parameter(found, "k.weight").norm(dim=1)
    # rotary pairs (j, j + 8) move together, in both heads: the largest of their four rows counts
    largest = model.k.weight.detach().norm(dim=1).reshape(2, 2, 8).amax((0, 1))
    order = largest.argsort(descending=True)
    torch.testing.assert_close(rows.reshape(2, 2, 8).amax((0, 1)), largest[order])
    assert torch.equal(parameter(found, "speeds"), model.speeds[order])

    def noise(weight: Tensor) -> float:
        keys = weight.reshape(2, 16, SIZE)
        keys = (torch.randn(50, SIZE, generator=torch.Generator().manual_seed(2)) @ keys.mT)
        return float((fake_quantize(keys, "int4[1x4]*f32") - keys).square().sum())

    assert noise(parameter(found, "k.weight")) < 0.85 * noise(model.k.weight.detach())


def test_what_the_model_returns_keeps_its_order_unless_a_cut_is_allowed():
    torch.manual_seed(0)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(20, 32), nn.LayerNorm(32)
            self.gated = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 32))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.table(ids)
            return x + self.gated(self.norm(x))

    model, ids = Encoder().eval(), torch.randint(0, 20, (3, 8))
    with torch.no_grad():
        model.norm.weight[[1, 9, 17, 25]] *= 30
    program = prepared(model, ids, RECIPE)
    [record] = Reorder().run(program).program.transforms
    assert record.refused is not None and "returns" in record.refused
    [record] = Reorder(cuts=1).run(program).program.transforms
    assert record.refused is None and len(record.runtime) == 1


def test_one_scale_a_row_gains_nothing():
    model, ids = decoder()
    assert not Reorder().run(prepared(model, ids, "int8-token")).modified


def test_the_error_of_an_order_is_that_of_the_moved_channels():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(9, 4)
    recipe = Recipe(name="r", description="", roles={
        "fprop.w": Role(format="int4[1x2]*f32"), "fprop.x": Role(format="int4[1x2]*f32")})
    work = Work(prepared(model, x, recipe), Smooth())
    [site] = work.sites()
    error, weight = OutputError(work, site), model[0].weight.detach()
    for order in itertools.permutations(range(4)):
        y, v = x[:, order], weight[:, order]
        got = fake_quantize(y, "int4[1x2]*f32") @ fake_quantize(v, "int4[1x2]*f32").mT
        want = float((got - y @ v.mT).square().sum() / (x @ weight.mT).square().sum())
        assert error(order=torch.tensor(order)) == pytest.approx(want, rel=1e-4)


def test_groups_of_a_convolution_have_no_common_order():
    torch.manual_seed(0)
    model, x = nn.Conv2d(4, 4, 3, groups=2).eval(), torch.randn(2, 4, 8, 8)
    work = Work(prepared(model, x, "int8"), Smooth())
    [site] = work.sites()
    with pytest.raises(PassError, match="between 2 groups"):
        OutputError(work, site)(order=torch.arange(4))


def test_bad_options():
    with pytest.raises(ConfigError, match="cuts=-1"):
        Reorder(cuts=-1)
