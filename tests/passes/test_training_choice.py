"""Where values are held: the room that a format gives, one exponent for all gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from scaleprop import _torch_compat as compat
from scaleprop import ops
from scaleprop.errors import ConfigError, FormatError
from scaleprop.passes.training import Formats
from scaleprop.passes.training.choice import (
    common_exponent,
    out_of_range,
    room_for,
    safest,
    scaled_with,
)
from scaleprop.passes.training.roles import gradient_values

from .training_graphs import ONE, Attention, Mlp, RmsNorm, joint_of, lowered, trained


@pytest.mark.parametrize(("amax", "drift", "margin", "room"), [
    (448.0, 0.0, 0, range(10)),  # 448 is 2^8.8; five binades above the least normal: 2^-1
    (4.0, 2.0, 2, range(-4, 2)),
    (4.0, 1.5, 2, range(-4, 2)),
    (448.0, 6.0, 2, range(6, 7)),  # not room for both
])  # fmt: skip
def test_rooms_of_e4m3(amax: float, drift: float, margin: int, room: range):
    assert room_for("e4m3", amax, drift, margin) == room


@pytest.mark.parametrize(("element", "drift"), [("e4m3", 0.0), ("e4m3", 2.0), ("e5m2", 5.0)])
def test_all_of_a_room_is_as_good(element: str, drift: float):
    """Gaussian data, which may have grown or shrunk: the same noise at any of the exponents."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    room = room_for(element, float(x.abs().max()), drift, 0)
    assert len(room) > 4

    def noise(exponent: int, moved: float) -> float:
        data = x * 2.0 ** (moved - exponent)
        assert data.abs().max() <= torch.finfo(ops.cast(data, element).dtype).max
        error = ops.cast(data, element).float() - data
        return float(error.square().mean() / data.square().mean())

    best = min(noise(exponent, 0.0) for exponent in room)
    for exponent in room:
        for moved in (0.0, drift, -drift):
            assert noise(exponent, moved) < 1.01 * best


def test_the_exponent_in_most_rooms():
    assert common_exponent([range(-5, 0), range(-3, 4), range(2, 9)]) == -1
    assert common_exponent([range(-20, -10), range(-15, -12), range(-3, 3)]) == -13
    assert common_exponent([]) == 0


@pytest.mark.parametrize(("amax", "lost"), [
    (1.0, ""), (448.0, ""), (449.0, "beyond the 448 of e4m3: saturates"),
    (math.inf, "saturates"), (math.nan, "saturates"), (2.0**-6, ""),
    (0.015, "below the normal numbers of e4m3, from 0.0156: underflows"),
    (0.0, "all zeros when measured"), (None, "of unknown size")])
def test_what_is_lost_at_exponent_0(amax: float | None, lost: str):
    found = out_of_range("e4m3", amax)
    assert (lost in found) if lost else not found


TWO = 2 * ONE


class Mixed(nn.Module):
    """Residuals, a norm, attention, a softmax loss: gradients that pass scales."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)
        self.attention, self.head = Attention(), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + torch.relu(self.layer(self.norm(x)))
        logits = self.head(y * torch.tanh(y))
        return nn.functional.cross_entropy(logits, torch.arange(len(x)) % 5) + self.attention(y)


@pytest.mark.parametrize("model", [Mlp(nn.GELU()), RmsNorm(), Mixed()],
                         ids=["mlp", "norm", "mixed"])
def test_what_is_said_to_follow_the_gradient_does(model: nn.Module):
    """Twice the incoming gradient gives twice the values, to the last bit; and nearly all do."""

    def use(joint: torch.fx.GraphModule, _: Any, values: list[Any]) -> int:
        (tangent,) = [node for node in joint.graph.find_nodes(op="placeholder")
                      if str(node.target).startswith("tangents")]
        moved = scaled_with(joint.graph, [tangent])
        assert set(moved) == gradient_values(joint.graph) - {joint.graph.output_node()}
        once, twice = (_all_values(joint, [*values[:-1], size]) for size in (ONE, TWO))
        with compat.without_modes():
            for node, passes in moved.items():
                if passes and isinstance(once[node], torch.Tensor):
                    assert torch.equal(twice[node], 2 * once[node]), node
        return sum(not passes for passes in moved.values())

    width = 16 if isinstance(model, Mlp) else 8
    assert joint_of(model, torch.randn(6, width), use=use) == [0]


def _all_values(joint: torch.fx.GraphModule, inputs: list[Any]) -> dict[torch.fx.Node, Any]:
    found: dict[torch.fx.Node, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad(), compat.without_modes():
        Watch(joint).run(*inputs, enable_io_processing=False)
    return found


class Deep(nn.Module):
    """Residual layers without biases: one exponent for all gradients saves multiplications."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp(nn.SiLU(), 16, bias=False) for _ in range(4))
        self.head = nn.Linear(16, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer.hidden(x)
        return nn.functional.cross_entropy(self.head(x), torch.arange(len(x)) % 7)


def test_one_multiplication_moves_all_gradients():
    torch.manual_seed(0)
    result = lowered(Deep(), torch.randn(32, 16))
    gradients = [cast for cast in result.casts if cast.kind == "dy"]
    assert len(gradients) == 8 and all(cast.free for cast in gradients)
    (exponent,) = {cast.exponent for cast in gradients}
    assert exponent is not None and exponent < 0
    # beside those of the other casts: where the gradient comes in, and where the head's goes out
    spent = [cast for cast in result.casts if not cast.free]
    assert result.rescales == len(spent) + 2


def test_gradients_are_moved_only_where_that_saves():
    result = lowered(Mlp(nn.GELU()), torch.randn(4, 16))  # one cast of a gradient
    (gradient,) = [cast for cast in result.casts if cast.kind == "dy"]
    assert not gradient.free


def test_unscaled_values_are_cast_as_they_are():
    torch.manual_seed(0)
    model = Mlp(nn.GELU())
    nn.init.constant_(model.up.weight, 1e-4)
    result = lowered(model, torch.randn(4, 16) * 1e4, formats=Formats(scaled=False))
    assert {(cast.exponent, cast.free) for cast in result.casts} == {(0, True)}
    lost = {cast.kind: cast.why for cast in result.casts}
    assert "saturates" in lost["x"] and "underflows" in lost["w"]
    assert result.rescales == 0


@pytest.mark.parametrize(("formats", "dtypes"), [
    (Formats(scaled=False, head=True), (torch.float8_e4m3fn, torch.float8_e5m2)),
    (Formats("bf16", "bf16", "bf16", scaled=False, head=True), (torch.bfloat16, torch.bfloat16)),
], ids=["fp8", "bf16"])
def test_unscaled_products_are_those_of_rounded_factors(
    formats: Formats, dtypes: tuple[torch.dtype, torch.dtype]
):
    """Against the same products in float64, the factors rounded by torch itself."""
    torch.manual_seed(0)
    model, x = Mlp(nn.Identity(), 8, bias=False), torch.randn(32, 16)
    up, down = (layer.weight.detach() for layer in (model.up, model.down))

    def low(value: torch.Tensor, dtype: torch.dtype = dtypes[0]) -> torch.Tensor:
        return value.float().to(dtype).double()

    hidden = low(x) @ low(up).t()
    result = low(hidden) @ low(down).t()
    dy = low(2 * result / result.numel(), dtypes[1])
    dh = low(dy @ low(down), dtypes[1])
    want = [result.square().mean(), dh.t() @ low(x), dy.t() @ low(hidden)]
    for got, exact in zip(trained(model, x, formats=formats), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2e-3, atol=1e-6)


def test_formats_refuse_what_they_cannot_do():
    with pytest.raises(FormatError, match="'e2m1' has no torch dtype"):
        Formats(x="e2m1")
    with pytest.raises(ConfigError, match="margin=-1"):
        Formats(margin=-1)


def test_sizes_of_which_squares_overflow():
    """The lowest number of a dtype, added as a mask; and a sum of the smallest."""

    class Masked(nn.Module):
        def __init__(self, number: float) -> None:
            super().__init__()
            self.layer, self.number = nn.Linear(16, 16, bias=False).double(), number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.eye(16, dtype=torch.float64) * self.number
            return (self.layer(x) + mask).softmax(-1).square().mean()

    for number in (torch.finfo(torch.float64).min, -1e-200, 0.0):
        result = lowered(Masked(number), torch.randn(16, 16).double(), formats=Formats(head=True))
        (weight,) = [cast for cast in result.casts if cast.kind == "w"]
        assert weight.exponent is not None


@pytest.mark.parametrize(("room", "exponent"), [
    (range(3, 4), 3), (range(-8, -6), -7), (range(6), 4), (range(-20, 1), -6)])
def test_more_room_is_left_to_grow_than_to_shrink(room: range, exponent: int) -> None:
    assert safest(room) == exponent
