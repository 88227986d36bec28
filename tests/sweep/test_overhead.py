"""The overhead model against numbers computed by hand from the module's formulas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.recipes.training import OPERANDS, Operand, Phase, TrainingRecipe
from scaleprop.sweeps.overhead import BALANCE, Factor, Gemm, Overhead, linear_gemms, overhead
from scaleprop.sweeps.shapes import gemms_of

M, N, K = 256, 128, 64  # tokens, outputs, inputs
X, W, DY = M * K, N * K, M * N  # elements
GEMMS = linear_gemms(M, N, K)
PLAIN_BYTES = 2 * 2 * (X + W + DY)  # each is read by two products
WORK = 3 * 2 * M * N * K
RESULTS = 2 * (M * N + M * K + N * K)


def recipe(operands: dict[str, Operand], **fields: object) -> TrainingRecipe:
    return TrainingRecipe(name="r", description="", operands=operands, **fields)  # type: ignore[arg-type]


def all_of(operand: Operand, **fields: object) -> TrainingRecipe:
    return recipe(dict.fromkeys(OPERANDS[:6], operand), **fields)


def costs(recipe: TrainingRecipe, **options: object) -> Overhead:
    return overhead(recipe, GEMMS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("plain", [recipe({}), all_of(Operand(format="bf16")),
                                   all_of(Operand(format="f16"))])
def test_bf16_is_one(plain: TrainingRecipe):
    found = costs(plain)
    assert found == Overhead(PLAIN_BYTES, RESULTS, 0, 0, 0, 0, WORK, 0, PLAIN_BYTES, WORK)
    assert (found.relative, found.operands, found.passes, found.rotations) == (1, 1, 0, 0)


def test_float32_moves_twice_as_much_at_half_the_speed():
    found = costs(all_of(Operand(format="f32")))
    assert found.operands == 2 and found.product_work == 2 * WORK and found.extra_bytes == 0


def test_mxfp8_by_hand():
    """8 bits and 8/32 of a scale; blocks of each role are along another axis: six quantizations."""
    found = costs(all_of(Operand(format="mxfp8")))
    codes = 2 * (X + W + DY) * (1 + 1 / 32)
    assert found.operand_bytes == codes
    assert found.quantize_bytes == PLAIN_BYTES + codes
    assert (found.amax_bytes, found.rotation_work, found.random_bytes) == (0, 0, 0)
    assert found.product_work == WORK / 2
    moved = codes + RESULTS + PLAIN_BYTES + codes
    assert found.relative == pytest.approx(
        (moved + WORK / 2 / BALANCE) / (PLAIN_BYTES + RESULTS + WORK / BALANCE), rel=1e-12)


def test_nvfp4_by_hand():
    """Weights in 16×16 tiles are quantized once, all others twice; every tensor has an amax to be
    read first; wgrad's factors are rotated for it and again for their codes."""
    flat = Operand(format="nvfp4")
    rotated = Operand(format="nvfp4", hadamard=16, signs="fixed")
    tiles = Operand(format="nvfp4_2d")
    found = costs(recipe({"fprop.x": flat, "fprop.w": tiles, "dgrad.dy": flat, "dgrad.w": tiles,
                          "wgrad.dy": rotated, "wgrad.x": rotated}))
    tensor, blocks, tile = 4, (4 + 8 / 16) / 8, (4 + 8 / 256) / 8
    one_w = W * tile + tensor
    others = 2 * (X + DY) * blocks + 4 * tensor
    assert found.operand_bytes == others + 2 * one_w
    assert found.amax_bytes == 2 * (2 * X + 2 * DY + W)
    assert found.quantize_bytes == 2 * (2 * X + 2 * DY + W) + others + one_w
    assert found.rotation_work == 2 * 2 * 16 * (X + DY)
    assert found.product_work == WORK / 4


def test_scales_of_blocks_that_are_cut_off_count():
    fmt = Operand(format="mxfp4")
    (fprop, *_) = linear_gemms(3, 5, 40)
    found = overhead(recipe({"fprop.x": fmt}), [fprop])
    assert found.operand_bytes == 3 * 40 / 2 + 3 * 2 + 2 * 5 * 40
    tiled = overhead(recipe({"fprop.w": Operand(format="e4m3[16x32]*f32")}), [fprop])
    assert tiled.operand_bytes == 2 * 3 * 40 + 5 * 40 + 1 * 2 * 4
    row = overhead(recipe({"fprop.w": Operand(format="e4m3[row]*f32")}), [fprop])
    assert row.operand_bytes == 2 * 3 * 40 + 5 * 40 + 5 * 4 and row.amax_bytes == 0
    column = overhead(recipe({"fprop.w": Operand(format="e4m3[channel]*f32")}), [fprop])
    assert column.operand_bytes == 2 * 3 * 40 + 5 * 40 + 40 * 4 and column.amax_bytes == 2 * 5 * 40


@pytest.mark.parametrize(("scaling", "readings"), [
    ("current", 1), ("held:50", 1 / 50), ("delayed:16", 0), ("static", 0), ("constant:-3", 0)])
def test_an_amax_that_is_known_is_not_read(scaling: str, readings: float):
    operand = Operand(format="e4m3[tensor]*f32", scaling=scaling)
    found = costs(all_of(operand))
    # one scale a tensor: one quantization is enough for both products
    assert found.amax_bytes == pytest.approx(2 * (X + W + DY) * readings)
    assert found.quantize_bytes == 3 * (X + W + DY) + 3 * 4


def test_random_codes_are_no_others():
    """Stochastic rounding draws for each role: nothing is shared, though the scale is."""
    random = Operand(format="e4m3[tensor]*f32", rounding="stochastic:16")
    assert costs(all_of(random)).quantize_bytes == 2 * 3 * (X + W + DY) + 6 * 4
    assert costs(all_of(random)).random_bytes == 0
    apart = costs(all_of(random), fused=False)
    assert apart.random_bytes == 2 * 2 * 2 * (X + W + DY)  # 2 roles · written, read · 2 bytes


def test_rotations_of_their_own():
    turned = Operand(format="mxfp4", hadamard=64, signs="step")
    fused, apart = costs(all_of(turned)), costs(all_of(turned), fused=False)
    assert fused.rotation_work == apart.rotation_work == 2 * 64 * 2 * (X + W + DY)
    assert fused.rotation_bytes == 0 and apart.rotation_bytes == 4 * 2 * (X + W + DY)
    assert fused.rotations == 128 * 2 * (X + W + DY) / WORK
    eden = Operand(format="nvfp4", rounding="eden", hadamard=128, signs="step")
    assert costs(all_of(eden), fused=False).random_bytes == 4 * 2 * (X + W + DY) / 16


def test_of_what_fprop_quantized_codes_are_read():
    again = Operand(format="mxfp4", of="quantized")
    found = costs(recipe({"fprop.x": Operand(format="mxfp8"), "wgrad.x": again}))
    assert found.quantize_bytes == X * (2 + 33 / 32) + X * (33 / 32 + 17 / 32)


def test_an_input_is_quantized_once_for_all_that_read_it():
    x = Factor("x", "x", M, K)
    three = [Gemm("fprop", x, Factor(f"w{i}", "w", N, K)) for i in range(3)]
    found = overhead(all_of(Operand(format="mxfp8")), three)
    assert found.quantize_bytes == (X + 3 * W) * (2 + 33 / 32)
    assert found.operand_bytes == 3 * (X + W) * 33 / 32


def test_what_stays_high_costs_what_bf16_does():
    kept = [dataclasses.replace(gemm, high=frozenset({"head"})) for gemm in GEMMS]
    mx = all_of(Operand(format="mxfp4"), high=("head",))
    assert overhead(mx, kept).relative == 1
    both = overhead(mx, [*kept, *linear_gemms(M, N, K, "other")])
    assert both.quantize_bytes == costs(mx.replace(high=())).quantize_bytes
    assert both.bf16_bytes == 2 * PLAIN_BYTES


def test_phases_are_weighted_by_their_steps():
    mx = all_of(Operand(format="mxfp8"))
    gone = {role: None for role in OPERANDS[:6]}
    phased = mx.replace(phases=(Phase(start=75, operands=gone),))
    early, late = costs(mx), costs(recipe({}))
    found = costs(phased, steps=100)
    for name in ("operand_bytes", "quantize_bytes", "product_work", "bf16_bytes"):
        assert getattr(found, name) == pytest.approx(
            0.75 * getattr(early, name) + 0.25 * getattr(late, name))
    assert costs(phased, steps=75) == early == costs(phased)


def test_truncation_of_every_tensor():
    found = costs(TrainingRecipe(name="e5m2", description="", every="e5m2", high=()))
    assert found.operands == 0.5 and found.extra_bytes == 0 and found.product_work == WORK / 2
    assert costs(TrainingRecipe(name="e5m7", description="", every="e5m7",
                                high=())).product_work == WORK  # 13 bits run as 16 do


@pytest.mark.parametrize(("call", "message"), [
    (lambda: overhead(recipe({}), []), "no product of a linear layer"),
    (lambda: costs(recipe({}), steps=0), "steps=0: at least 1"),
    (lambda: linear_gemms(0, 1, 1), "each is at least 1"),
])
def test_what_cannot_be_counted_is_refused(call, message: str):
    with pytest.raises(ConfigError, match=message):
        call()


class Tiny(nn.Module):
    """Two products read one input, one is next to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.a(x).relu() * self.b(x)
        return nn.functional.cross_entropy(self.head(hidden), y)


def test_products_are_read_off_the_graph():
    x = torch.randn(7, 8, requires_grad=True)  # so that the first layers have an input gradient
    found = gemms_of(Tiny(), lambda model: model(x, torch.zeros(7, dtype=torch.long)), ("head",))
    low = [gemm for gemm in found if not gemm.high]
    shape = {"fprop": (7, 12, 8), "dgrad": (7, 8, 12), "wgrad": (12, 8, 7)}
    for product, (m, n, k) in shape.items():
        mine = [gemm for gemm in low if gemm.product == product]
        assert len(mine) == 2
        for gemm in mine:
            assert {(each.rows, each.along) for each in gemm.factors} == {(m, k), (n, k)}
    assert len({gemm.left.value for gemm in low if gemm.product == "fprop"}) == 1
    # one input of both; blocks of 32 are cut off at 8
    shared = overhead(recipe({"fprop.x": Operand(format="mxfp8")}), low)
    assert shared.quantize_bytes == 7 * 8 * (2 + 1) + 7
    # weights in tiles are the same for fprop and dgrad, of each layer
    tiles = Operand(format="nvfp4_2d")
    weights = overhead(recipe({"fprop.w": tiles, "dgrad.w": tiles}), low)
    assert weights.quantize_bytes == 2 * (12 * 8 * (2 + 1 / 2) + 1 + 4)
    assert weights.operand_bytes == weights.bf16_bytes - 4 * (12 * 8 * (2 - 1 / 2) - 1 - 4)
    head = [gemm for gemm in found if gemm.high]
    assert {gemm.product for gemm in head} == {"fprop", "dgrad", "wgrad"}
    assert {each.elements for gemm in head for each in gemm.factors} == {7 * 12, 5 * 12, 7 * 5}


class Residual(nn.Module):
    """Three residual branches of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for branch in self.branches:
            x = x + branch(x)
        return nn.functional.cross_entropy(self.head(x), y)


@pytest.mark.parametrize("high", [(), ("head",), ("head", "last:1"), ("first:2",)])
def test_what_is_counted_low_is_what_training_quantizes(high: tuple[str, ...]):
    batch = torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    found = gemms_of(Residual(), lambda model: model(*batch), high)
    low = [gemm for gemm in found if not gemm.high.intersection(high)]
    model = scaleprop.prepare_training(
        Residual(), all_of(Operand(format="mxfp8"), high=high), inner="eager")
    model(*batch).backward()
    (report,) = scaleprop.scale_report(model)
    roles = sorted(f"{gemm.product}.{each.kind}" for gemm in low for each in gemm.factors)
    assert sorted(each.role for each in report.quantized) == roles
    assert len(found) == 7 * 3
    mx = all_of(Operand(format="mxfp8"), high=high)
    full = overhead(mx, [dataclasses.replace(gemm, high=frozenset()) for gemm in low])
    assert overhead(mx, found).quantize_bytes == full.quantize_bytes
