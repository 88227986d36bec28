"""Weights that lie in stacks, in fused tensors, in einsums and in grouped products are weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scaleprop
from scaleprop.passes.unit.capture import capture_training
from scaleprop.passes.unit.forward import rms
from scaleprop.passes.unit.structure import product_contraction
from scaleprop.passes.unit.synonyms import spell_synonyms
from scaleprop.rules import rule_for

E, T, K, N, H = 4, 64, 32, 48, 8


class Of(nn.Module):
    """``run(x, *weights)``."""

    def __init__(self, run: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(0.02 * torch.randn(shape) for shape in shapes)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, *self.weights)


ENDS = torch.tensor([10, 10, 40, T], dtype=torch.int32)  # one expert gets nothing
ROUTED = torch.arange(T) % E


@torch.library.custom_op("scaleprop_tests::grouped_mm", mutates_args=())
def grouped_mm(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """A library's own grouped product."""
    group = torch.bucketize(torch.arange(len(x)), ends, right=True)
    return torch.bmm(x[:, None], w[group])[:, 0]


@grouped_mm.register_fake
def _(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


def keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, w, ends = ctx.saved_tensors
    group = torch.bucketize(torch.arange(len(x)), ends, right=True)
    of_w = torch.zeros_like(w).index_add(0, group, x[:, :, None] * gradient[:, None])
    return torch.bmm(gradient[:, None], w.mT[group])[:, 0], of_w, None


grouped_mm.register_autograd(backward, setup_context=keep)


def grouped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return grouped_mm(x, w, ENDS)


def looped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.linear(part, w[e]) for e, part in enumerate(x.chunk(E))])


def picked(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.bmm(w[ROUTED], x[..., None]).squeeze(-1)


def fused(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    one, two = w.chunk(2)
    return F.linear(x, one) + F.linear(x.flip(-1), two)


# what is computed, of which weight, from what; fan-in, fan-out
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], int, int]] = {
    "bmm": (torch.bmm, (E, K, N), (E, T, K), K, N),
    "matmul": (torch.matmul, (E, K, N), (2, E, T, K), K, N),
    "weight first": (lambda x, w: w @ x, (E, N, K), (E, K, T), K, N),
    "one position, all experts": (lambda x, w: torch.matmul(x, w), (E, K, N), (T, K), K, E * N),
    "baddbmm": (lambda x, w: torch.baddbmm(torch.zeros(()), x, w), (E, K, N), (E, T, K), K, N),
    "grouped": (grouped, (E, K, N), (T, K), K, N),
    "grouped, transposed": (lambda x, w: grouped(x, w.mT), (E, N, K), (T, K), K, N),
    "looped": (looped, (E, N, K), (T, K), K, N),
    "picked": (picked, (E, N, K), (T, K), K, N),
    "fused": (fused, (2 * N, K), (T, K), K, N),
    "einsum": (lambda x, w: torch.einsum("tk,kn->tn", x, w), (K, N), (T, K), K, N),
    "einsum transposed": (lambda x, w: torch.einsum("nk,kt->tn", w, x), (N, K), (K, T), K, N),
    "einsum, implicit": (lambda x, w: torch.einsum("tk,kn", x, w), (K, N), (T, K), K, N),
    "einsum of heads": (lambda x, w: torch.einsum("btk,khd->bhtd", x, w), (K, H, 6), (2, T, K), K,
                        H * 6),
    "einsum over heads": (lambda x, w: torch.einsum("bhtd,hdk->btk", x, w), (H, 6, N),
                          (2, H, T, 6), H * 6, N),
    "einsum of experts": (lambda x, w: torch.einsum("etk,enk->ten", x, w), (E, N, K), (E, T, K),
                          K, N),
    "einsum, ellipsis": (lambda x, w: torch.einsum("...k, k n -> ...n", x, w), (K, N), (2, T, K),
                         K, N),
}


@pytest.mark.parametrize("case", CASES)
def test_are_products(case: str) -> None:
    run, shape, given, fan_in, fan_out = CASES[case]
    torch.manual_seed(0)
    model = Of(run, shape)
    x = torch.randn(given)
    unit = scaleprop.unit_scale(model, (x,), powers_of_two=False)
    use = unit.scaling.parameters["weights.0"]
    assert (use.fan_in, use.fan_out, use.roles) == (fan_in, fan_out, ("output",))
    assert not unit.scaling.unruled
    weight = unit.get_parameter("weights.0")
    assert rms(weight.detach()) == pytest.approx(1, rel=1e-5)
    y = unit(x)
    assert rms(y.detach()) == pytest.approx(1, abs=0.1) or case in ("fused", "grouped")
    # the same function of the weight, but for constants
    torch.testing.assert_close(y / rms(y.detach()), (r := run(x, weight)) / rms(r.detach()),
                               rtol=1e-4, atol=1e-4)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    assert weight.grad is not None
    assert rms(weight.grad) == pytest.approx(1, abs=0.1)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mT": lambda w: w.mT, "mH": lambda w: w.mH, "adjoint": lambda w: w.adjoint(),
    "T": lambda w: w[0].T, "movedim": lambda w: w.movedim(0, -1),
    "movedim of several": lambda w: w.movedim((0, 2), (1, 0)),
    "moveaxis": lambda w: torch.moveaxis(w, 2, 0), "swapdims": lambda w: w.swapdims(0, 2),
    "expand_as": lambda w: w[:1].expand_as(w), "ravel": lambda w: w.ravel(),
    "broadcast_to": lambda w: w.broadcast_to(2, *w.shape),
    "linalg.matmul": lambda w: torch.linalg.matmul(w, w.transpose(1, 2)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_synonyms_are_what_they_were(view: str) -> None:
    function = VIEWS[view]
    module, _ = capture_training(Of(lambda x, w: function(w) * x, (E, K, N)),
                                 (torch.ones(()),), {}, None)
    expected = module(torch.ones(()))
    assert spell_synonyms(module.graph) == 1
    module.recompile()
    assert torch.equal(module(torch.ones(())), expected)
    assert all(rule_for(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("equation", ["tk,kn->tn", "btk,khd->bhtd", "bhtd,hdk->btk", "...k,kn"])
def test_einsums_take_other_sizes(equation: str) -> None:
    rank, shape = {"tk,kn->tn": (2, (K, N)), "btk,khd->bhtd": (3, (K, H, 6)),
                   "bhtd,hdk->btk": (4, (H, K, N)), "...k,kn": (4, (K, N))}[equation]
    x = torch.randn(*(5, H, 7)[:rank - 1], K)
    unit = scaleprop.unit_scale(Of(lambda x, w: torch.einsum(equation, x, w), shape), (x,))
    found = unit(x[:3])
    torch.testing.assert_close(found, unit(x)[:3])


@pytest.mark.parametrize("equation", [
    "kk,kn->n", "tk,kn->n", "tk,kk->tk", "tk,kn,kn->tn", "ak,kn->n"])
def test_other_einsums_stay_and_are_reported(equation: str) -> None:
    """Diagonals, sums over one factor's own axes, products without a sum, of three factors."""
    count = equation.count(",")
    x = torch.randn(K, K)
    model = Of(lambda x, w: torch.einsum(equation, x, *[w] * count), (K, K))
    unit = scaleprop.unit_scale(model, (x,))
    assert unit.scaling.unruled == {"aten.einsum.default": 1}
    assert unit.scaling.parameters["weights.0"].roles == ()
    torch.testing.assert_close(unit(x), model(x))


def test_a_library_s_operator_that_only_sounds_alike_is_none() -> None:
    node = torch.fx.Graph().call_function(torch.ops.aten.mm.default, (1, 2))
    assert product_contraction(node) is not None
    node.target = torch.ops.scaleprop_tests.grouped_mm.default
    assert product_contraction(node) is None  # of numbers


@pytest.mark.parametrize("run", [
    lambda x, w: grouped(x, w), lambda x, w: torch.bmm(x.view(E, -1, K), w).view(-1, N),
    lambda x, w: torch.einsum("etk,ekn->etn", x.view(E, -1, K), w).reshape(-1, N)],
    ids=["grouped", "bmm", "einsum"])
def test_learning_rates_go_by_one_matrix_of_a_stack(run: Any) -> None:
    """fan-in K, not E·K: each position meets one matrix."""
    torch.manual_seed(0)
    model = Of(lambda x, a, w, h: run(x @ a, w).relu() @ h, (8, K), (E, K, N), (N, 3))
    x = torch.randn(T, 8)
    unit = scaleprop.unit_scale(model, (x,), "u-mup")
    use = unit.scaling.parameters["weights.1"]
    assert (use.roles, use.fan_in, use.fan_out, use.rank) == (("hidden",), K, N, 3)
    weight = unit.get_parameter("weights.1")

    def rate(optimizer: Any) -> list[float]:
        return [group["lr"] for group in scaleprop.parameter_groups(unit, optimizer, lr=1.0)
                if any(p is weight for p in group["params"])]

    assert rate("adam") == [pytest.approx(K**-0.5)]
    assert rate("sgd") == [pytest.approx(K * 2.0**-use.potential)]
    assert rate("muon") == []  # it takes matrices only


def test_pytorch_s_own_grouped_product() -> None:
    """In bfloat16, which it takes alone where it is traced."""
    torch.manual_seed(0)
    model = Of(lambda x, w: F.grouped_mm(x, w, offs=ENDS), (E, K, N)).bfloat16()
    x = torch.randn(T, K).bfloat16()
    unit = scaleprop.unit_scale(model, (x,))
    use = unit.scaling.parameters["weights.0"]
    assert (use.roles, use.fan_in, use.fan_out) == (("output",), K, N)
    assert not unit.scaling.unruled
    assert rms(unit(x).detach()) == pytest.approx(1, abs=0.1)
    torch.manual_seed(1)
    (unit(x) * torch.randn(T, N).bfloat16()).sum().backward()
    gradient = unit.get_parameter("weights.0").grad
    assert gradient is not None and 0.7 < rms(gradient) < 1.5  # a power of two
