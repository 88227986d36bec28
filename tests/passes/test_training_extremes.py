"""Values of any size that their dtype can say are cast; what trains in eager PyTorch trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from scaleprop.backends.graphs import compile_joint
from scaleprop.passes.exponents import carry, most
from scaleprop.passes.training import Formats, lower_products
from scaleprop.passes.training.choice import MOST, lost_within, within

from .training_graphs import Mlp, lowered, trained

aten = torch.ops.aten
LOW_HEAD = Formats(head=True)


class Far(nn.Module):
    """Two layers whose weights are of size 2^first and 2^last, each undone after it."""

    def __init__(
        self, first: int, last: int = 0, before: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False, dtype=dtype)
        self.down = nn.Linear(32, 8, bias=False, dtype=dtype)
        self.powers = (first, last, before)
        with torch.no_grad():
            self.up.weight *= 2.0**first
            self.down.weight *= 2.0**last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, last, before = self.powers
        y = self.up(x * 2.0**before) * 2.0 ** -(first // 2)
        y = (y * 2.0 ** -(first - first // 2 + before)).relu()
        return (self.down(y) * 2.0**-last).square().mean()


class Wide(nn.Module):
    """A model whose loss is float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).float()


def exact(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The step in float64, by eager PyTorch."""
    wide = model.double()
    wide.zero_grad()
    loss = wide(x.double())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in wide.parameters() if p.grad is not None)]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Gradients that point the same way within E4M3's and E5M2's noise, and are as long."""
    assert got[0].item() == pytest.approx(want[0].item(), rel=0.05)
    for narrow, wide in zip(got[1:], want[1:], strict=True):
        narrow, unit = narrow.double(), wide / wide.norm()
        assert (narrow * unit).sum() / wide.norm() == pytest.approx(1.0, abs=0.05)
        assert (narrow / narrow.norm() * unit).sum() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU()], ids=["relu", "gelu"])
def test_a_model_in_half_precision(act: nn.Module, dtype: torch.dtype):
    torch.manual_seed(0)
    model, x = Wide(Mlp(act).to(dtype)), torch.randn(64, 16).to(dtype)
    got = trained(model, x, formats=LOW_HEAD)
    assert all(value.dtype == dtype for value in got[1:])
    assert_close(got, exact(model, x))


def test_float16_has_no_room_for_products_of_data_that_are_scaled_at_run_time():
    """Positive factors, 128 of them: their data's products add up to beyond 65504."""
    layer, x = nn.Linear(128, 8, bias=False).half(), torch.rand(4, 128).half()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.0)

    def backend(graph: torch.fx.GraphModule, given: list[Any]) -> Any:
        def transform(joint: torch.fx.GraphModule) -> None:
            places = joint.graph.find_nodes(op="placeholder")
            parameters = [node for node, value in zip(places, given, strict=False)
                          if isinstance(value, nn.Parameter)]
            lower_products(joint, parameters, LOW_HEAD, None)

        return compile_joint(graph, given, transform, "eager")

    torch._dynamo.reset()
    result = torch.compile(layer, backend=backend, fullgraph=True)(x)
    want = x.double() @ layer.weight.double().t()
    assert torch.allclose(result.double(), want, rtol=0.05)


@pytest.mark.parametrize("powers", [(-120, 0, 0), (-118, -120, 0), (0, -120, 0), (110, 0, 0),
                                    (-70, -45, -40), (-45, 0, -45), (60, 0, 30)], ids=str)
def test_weights_of_any_size(powers: tuple[int, int, int]):
    torch.manual_seed(0)
    model, x = Far(*powers), torch.randn(64, 16)
    got = trained(model, x, formats=LOW_HEAD)
    assert_close(got, exact(model, x))
    result = lowered(model.float(), x, formats=LOW_HEAD)
    weights = [cast for cast in result.casts if cast.kind == "w"]
    for cast, power in zip(weights, powers, strict=False):
        assert cast.exponent is not None and not cast.why
        assert abs(cast.exponent - power) < 16


def test_float64_has_room_for_more():
    torch.manual_seed(0)
    model, x = Far(-300, 200, 0, torch.float64), torch.randn(64, 16).double()
    assert_close(trained(model, x, formats=LOW_HEAD), exact(model, x))


def test_what_no_power_of_two_can_bring_into_range_is_reported():
    """Subnormal weights: 2^-126 is the last power, and E4M3 does not reach 2^-14."""
    torch.manual_seed(0)
    model, x = Far(-138), torch.randn(64, 16)
    (cast,) = [c for c in lowered(model, x, formats=LOW_HEAD).casts if c.kind == "w"
               and c.exponent == -126]
    assert "is no number of float32: held at 2^-126 instead; amax" in cast.why
    assert cast.why.endswith("underflows")
    assert all(value.isfinite().all() for value in trained(model, x, formats=LOW_HEAD))


@pytest.mark.parametrize(("room", "most", "expected"), [
    (range(-3, 4), 5, range(-3, 4)), (range(-9, 4), 5, range(-5, 4)), (range(2, 9), 5, range(2, 6)),
    (range(-9, -6), 5, range(-5, -4)), (range(7, 9), 5, range(5, 6)),
    (range(-9, 9), 5, range(-5, 6)),
])  # fmt: skip
def test_rooms_within_a_bound(room: range, most: int, expected: range):
    assert within(room, most) == expected


def test_two_factors_have_room_in_float32():
    assert most(torch.float32) >= 2 * MOST


def test_what_is_lost_outside_of_a_room():
    room = range(-130, -124)
    assert lost_within("e4m3", 2.0**-124, -126, room, "float32") == ""
    assert "amax 0.00781 is below the normal numbers of e4m3" in lost_within(
        "e4m3", math.ldexp(1.0, -107), -100, room, "float32")
    assert lost_within("e4m3", math.ldexp(1.0, -100), -100, room, "float32") == (
        "2^-130 is no number of float32: held at 2^-100 instead; loses precision")


def test_a_narrow_term_is_not_held_where_a_wide_one_is():
    """Float16 has room for 2^±11: a sum with float32 data at 2^60 is of unscaled terms."""
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.add.Tensor(x.relu(), y.relu())

    x, y = torch.randn(64).half(), torch.randn(64)
    module = make_fx(Mixed())(x, y)
    want = module(x, y)
    wide = [n for n in module.graph.nodes if n.target is aten.relu.default
            and n.meta["val"].dtype == torch.float32]
    carry(module, {wide[0]: 60})
    assert torch.equal(module(x, y), want)
