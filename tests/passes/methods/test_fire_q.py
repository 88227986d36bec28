"""FireQ: factors of keys in loops, pairs of rotary embeddings, what remains at run time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.passes.methods.fire_q import FireQ

from .small import parameter, prepared

SIZE, HEAD, HALF = 32, 8, 4
HOT = [2, 13, 24]


class Attention(nn.Module):
    """Grouped attention, two heads of keys for four of queries; ``turns``: rotary embeddings."""

    def __init__(self, turns: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE)
        self.q, self.k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE // 2)
        self.v, self.o = nn.Linear(SIZE, SIZE // 2), nn.Linear(SIZE, SIZE)
        self.turns = turns

    def turned(self, x: Tensor) -> Tensor:
        if not self.turns:
            return x
        angles = torch.arange(x.shape[2])[:, None] * 0.3 ** torch.arange(HALF)
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        return x * cos + torch.cat([-x[..., HALF:], x[..., :HALF]], -1) * sin

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self.turned(q), self.turned(k)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def model_of(turns: bool = True) -> tuple[Attention, Tensor]:
    torch.manual_seed(0)
    model, x = Attention(turns).eval(), torch.randn(3, 12, SIZE)
    with torch.no_grad():
        model.norm.weight.copy_(torch.rand(SIZE) + 0.5)
        model.norm.weight[HOT] *= 20
        model.k.weight.mul_(torch.logspace(0, 1, 16)[torch.randperm(16)][:, None])
    return model, x


@pytest.mark.parametrize("turns", [True, False])
def test_keys_of_a_head_come_to_reach_equally_far(turns):
    model, x = model_of(turns)
    found = FireQ(steps=0).run(prepared(model, x, "int4-fp8")).program
    keys = model.k(model.norm(x)).detach().abs().reshape(-1, 16).amax(0).tolist()
    expected = []
    for head in (keys[:HEAD], keys[HEAD:]):
        if turns:  # the farther of each pair
            head = [max(head[j], head[(j + HALF) % HEAD]) for j in range(HEAD)]
        middle = math.exp(sum(math.log(reach) for reach in head) / HEAD)
        expected += [middle / reach for reach in head]
    ratio = parameter(found, "k.weight") / model.k.weight.detach()
    torch.testing.assert_close(ratio, torch.tensor(expected)[:, None].expand(16, SIZE),
                               rtol=1e-4, atol=0)
    torch.testing.assert_close(parameter(found, "k.bias"),
                               model.k.bias.detach() * torch.tensor(expected))
    # two heads of queries for each head of keys
    inverse = 1 / torch.tensor(expected).reshape(2, 1, HEAD).expand(2, 2, HEAD).reshape(-1)
    torch.testing.assert_close(parameter(found, "q.weight"),
                               model.q.weight.detach() * inverse[:, None], rtol=1e-4, atol=1e-6)


def test_outliers_after_rotary_embeddings_move_at_run_time():
    model, x = model_of()
    result = FireQ(steps=0, keys=False, after=2).run(prepared(model, x, "int4-fp8")).program
    [record] = result.transforms
    assert len(record.runtime) == 2 and not record.absorbed
    h = model.norm(x)
    keys = model.turned(model.k(h).unflatten(-1, (-1, HEAD)).transpose(1, 2)).detach()
    reach = keys.abs().amax((0, 1, 2))
    middle = sorted(reach.tolist())[(HEAD - 1) // 2]
    top = sorted(range(HEAD), key=lambda j: -float(reach[j]))[:2]
    expected = torch.tensor([float(reach[j]) / middle if j in top else 1.0 for j in range(HEAD)])
    [node] = [n for n in result.module.graph.nodes if "scaled_dot_product" in str(n.target)]
    queries, scaled = (getattr(result.module, str(source.args[1].target))
                       for source in node.args[:2])  # fmt: skip
    torch.testing.assert_close(queries, expected)
    torch.testing.assert_close(scaled, 1 / expected)


def test_with_both_heads_share_their_factors():
    model, x = model_of()
    found = FireQ(steps=0, after=2).run(prepared(model, x, "int4-fp8")).program
    ratio = (parameter(found, "k.weight") / model.k.weight.detach())[:, 0].reshape(4, HALF)
    torch.testing.assert_close(ratio, ratio[:1].expand(4, HALF))  # of pairs and heads alike


@pytest.mark.parametrize("options", ["", "{after=3}", "{steps=0}"])
def test_the_function_is_kept(options):
    model, x = model_of()
    compiled = scaleprop.compile(model, x, "int4-fp8", "reference", calibration=[x],
                                 passes=[f"fire-q{options}"], verify=True)
    applied = [item for item in compiled.program.transforms if item.refused is None]
    assert len([item for item in applied if item.runtime]) == ("after" in options)
    assert len([item for item in applied if not item.runtime]) == (1 if "steps" in options else 3)


def test_the_error_falls_and_onnxruntime_agrees():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.RMSNorm(SIZE), nn.Linear(SIZE, 48)).eval(), torch.randn(40, SIZE)
    with torch.no_grad():
        model[0].weight[HOT] *= 20
        model[1].weight[:, HOT] /= 10
    want, error = model(x), []
    for passes in ([], ["fire-q"]):
        compiled = scaleprop.compile(model, x, "int4-fp8", calibration=[x], passes=passes,
                                     verify=True)
        error.append(float((compiled(x) - want).norm() / want.norm()))
    assert error[1] < 0.7 * error[0]


def test_keys_that_are_normalised_are_refused():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x)[:, None], F.normalize(self.k(x), dim=-1)[:, None]
            return F.scaled_dot_product_attention(q, k, k)[:, 0]

    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(2, 6, SIZE)
    records = FireQ(steps=0).run(prepared(model, x, "int4-fp8")).program.transforms
    assert [item.refused is not None for item in records] == [True]


@pytest.mark.parametrize("options", [{"steps": -1}, {"after": -1}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match="at least 0"):
        FireQ(**options)
