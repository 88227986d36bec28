"""Products of a training step are told apart; their factors are held where formats are good."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scaleprop import ops
from scaleprop.passes.training import Formats, find_products, lower_products
from scaleprop.passes.training.choice import BINADES, headroom
from scaleprop.passes.training.drift import GRADIENT, INPUT, PARAMETER, addends, drifts
from scaleprop.passes.training.roles import is_tangent
from scaleprop.passes.training.statistics import exponent_for, measured_amax

from .training_graphs import Attention, Batched, Mlp, RmsNorm, joint_of, lowered

aten = torch.ops.aten
LOW_HEAD = Formats(head=True)


def test_roles_of_linear_layers():
    (products,) = joint_of(Mlp(nn.ReLU()), torch.randn(4, 16, requires_grad=True),
                           use=lambda joint, parameters, _: find_products(joint.graph, parameters))
    assert not products.high
    kinds = sorted((p.role, *sorted((p.left.kind, p.right.kind))) for p in products.found)
    assert kinds == sorted([("fprop", "w", "x"), ("dgrad", "dy", "w"), ("wgrad", "dy", "x")] * 2)


def test_tangents_are_the_gradients_that_come_in():
    graph = torch.fx.Graph()
    given = [graph.placeholder(name) for name in ("primals_1", "tangents_1", "tangents_2")]
    computed = graph.call_function(aten.relu.default, (given[0],), name="tangents_3")
    assert [is_tangent(node) for node in (*given, computed)] == [False, True, True, False]


def test_products_of_activations_stay_high():
    (result,) = joint_of(Attention(), torch.randn(4, 8, requires_grad=True),
                         use=lambda joint, parameters, _: find_products(joint.graph, parameters))
    roles = sorted(product.role for product in result.found)
    assert roles == ["dgrad"] * 2 + ["fprop"] * 2 + ["wgrad"] * 2
    assert sorted(result.high.values()) == [
        *["a gradient of attention, or of another product of activations"] * 2,
        "neither factor is a parameter"]


@pytest.mark.parametrize(("layer", "x", "why"), [
    (nn.Conv1d(3, 3, 1), torch.randn(2, 3, 4), "a convolution: only products of matrices"),
    (nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), torch.randn(2, 4, 8),
     "attention runs in high precision"),
    (Batched(), torch.randn(2, 3, 4), "a batch of products: only single matrices"),
])  # fmt: skip
def test_other_sums_of_products_are_reported(layer: nn.Module, x: torch.Tensor, why: str):
    (result,) = joint_of(layer, x, use=lambda joint, parameters, _: find_products(
        joint.graph, parameters))
    backward = [node for node, reason in result.high.items() if reason.startswith(why)]
    assert len(backward) >= 2  # forward and backward


def test_without_a_batch_every_scale_is_found_at_run_time():
    (result,) = joint_of(Mlp(nn.GELU()), torch.randn(4, 16),
                         use=lambda joint, parameters, _: lower_products(
                             joint, parameters, Formats(), None))
    assert {(cast.exponent, cast.why) for cast in result.casts} == {(None, "of unknown size")}


def test_each_value_is_cast_once_in_each_format():
    result = lowered(Mlp(nn.GELU()), torch.randn(4, 16, requires_grad=True), formats=LOW_HEAD)
    values = [(cast.value, cast.element) for cast in result.casts]
    assert len(values) == len(set(values)) == 6  # two inputs, two weights, two gradients
    assert len(result.products) == 6


@pytest.mark.parametrize(("act", "free"), [(nn.ReLU(), True), (nn.GELU(), False)])
def test_exponents_come_with_the_product_where_scales_pass(act: nn.Module, free: bool):
    torch.manual_seed(0)
    result = lowered(Mlp(act), torch.randn(64, 16), formats=LOW_HEAD)
    (hidden,) = [c for c in result.casts if c.value in ("relu", "gelu")]
    assert hidden.kind == "x" and hidden.free == free
    assert hidden.exponent is not None and hidden.exponent < 0


def test_amax_lies_within_the_format_and_its_drift():
    torch.manual_seed(0)
    for margin in (2, 5):
        formats = Formats(margin=margin, head=True)
        result = lowered(Mlp(nn.GELU()), torch.randn(64, 16), formats=formats)
        for cast in result.casts:
            assert cast.exponent is not None and cast.amax
            top, smallest = {"e4m3": (448.0, 2.0**-6), "e5m2": (57344.0, 2.0**-14)}[cast.element]
            held = cast.amax * 2.0**-cast.exponent
            assert held * 2.0**max(margin, cast.drift) <= top
            assert held >= smallest * 2.0**BINADES


def test_alphas_take_the_rescales_of_products():
    torch.manual_seed(0)

    def use(joint: torch.fx.GraphModule, parameters: Any, values: Any) -> list[Any]:
        result = lower_products(joint, parameters, Formats(), values)
        products = joint.graph.find_nodes(op="call_function", target=ops.gemm)
        assert len(products) == len(result.products)
        return [node.args[2] for node in products]

    (alphas,) = joint_of(Mlp(nn.ReLU()), torch.randn(4, 16), use=use)
    assert any(alpha != 1.0 for alpha in alphas)


def test_a_weight_of_zeros_gets_its_scale_at_run_time():
    model = Mlp(nn.ReLU())
    nn.init.zeros_(model.down.weight)
    result = lowered(model, torch.randn(4, 16))
    at_run_time = {cast.why for cast in result.casts if cast.exponent is None}
    assert at_run_time == {"all zeros when measured"}


def test_drift_is_a_product_of_powers():
    def use(joint: torch.fx.GraphModule, parameters: Any, _: Any) -> dict[str, float]:
        found = drifts(joint.graph, parameters)
        return {node.name: drift for node, drift in found.items()}

    (drift,) = joint_of(Mlp(nn.ReLU()), torch.randn(4, 16), use=use)
    assert drift["mm"] == pytest.approx((PARAMETER**2 + INPUT**2) ** 0.5)
    assert drift["tangents_1"] == GRADIENT
    (normed,) = joint_of(RmsNorm(), torch.randn(4, 8), use=use)
    # x·rsqrt(mean(x²)) is as large as it was, whatever x does: what is left is the gain
    (last,) = [name for name in normed if name == "mul_1"]
    assert normed[last] == pytest.approx(PARAMETER)


def test_a_sum_drifts_as_its_terms_do_by_their_shares():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.layer(x)).square().mean()

    def use(joint: torch.fx.GraphModule, parameters: Any, _: Any) -> tuple[float, ...]:
        (total,) = [node for node in joint.graph.nodes if node.target is aten.add.Tensor]
        found = addends(joint.graph)
        assert found == set(total.args)
        (x,), (y,) = ([node for node in found if node.op == op]
                      for op in ("placeholder", "call_function"))
        unknown = drifts(joint.graph, parameters)[total]
        return unknown, drifts(joint.graph, parameters, {x: 4.0, y: 3.0})[total]

    ((unknown, known),) = joint_of(Residual(), torch.randn(4, 8), use=use)
    assert unknown == pytest.approx((INPUT**2 + PARAMETER**2) ** 0.5)  # as the layer's output
    assert known == pytest.approx((INPUT**2 + (0.36 * PARAMETER) ** 2) ** 0.5)


def test_values_that_drift_beyond_the_format_are_scaled_at_run_time():
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(16)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).square().mean()

    result = lowered(Deep(), torch.randn(4, 8))
    inputs = [cast for cast in result.casts if cast.kind == "x"]
    assert inputs[0].exponent is not None
    assert inputs[-1].exponent is None and inputs[-1].why == "may drift by 2^8, e4m3 has room " \
        f"for 2^{headroom('e4m3')}"


@pytest.mark.parametrize(("amax", "margin", "expected"), [
    (448.0, 0, 0), (449.0, 0, 1), (224.0, 0, -1), (448.0, 2, 2), (0.0, 2, 0),
    (float("nan"), 0, 0), (float("inf"), 0, 0), (2.0**-140, 0, -148)])  # fmt: skip
def test_exponent_for(amax: float, margin: int, expected: int):
    assert exponent_for(amax, 448.0, margin) == expected


def test_measuring_reads_real_values_and_leaves_the_generator():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Dropout(0.5))
    nn.init.constant_(model[0].weight, 0.5)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).sum()

    def use(joint: torch.fx.GraphModule, _: Any, values: Any) -> Any:
        (product,) = [n for n in joint.graph.nodes if n.name == "mm"]
        before = torch.random.get_rng_state()
        amax = measured_amax(joint, values, {product})[product]
        return amax, before, torch.random.get_rng_state()

    ((amax, before, after),) = joint_of(Loss(), torch.ones(3, 4), use=use)
    assert amax == 2.0
    assert torch.equal(before, after)
