"""Gradient estimators against their formulas, written out in float64 one number at a time."""

from __future__ import annotations

import bisect
import functools
import math

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from scaleprop.errors import ConfigError, FormatError
from scaleprop.formats import fake_quantize, quantize
from scaleprop.formats.elements import CodebookElement, element
from scaleprop.ops.estimators import (
    ESTIMATORS,
    backward,
    dge_mean,
    forward,
    parse_estimator,
)

ELEMENTS = ["e2m1", "e4m3", "e5m2", "e3m2", "e8m1", "int4", "int8", "mxint8", "ternary", "binary",
            "nf4", "log2u4", "log2s4"]
BLOCKED = ["mxfp4", "nvfp4", "nvfp4_2d", "int4[row]*f32", "fp8", "e2m1[1x16]*ue5m3*f32",
           "int8[channel]*f32", "int4[1x32]*f16+zp", "e4m3[1x8]*bf16", "nvfp4:fouroversix",
           "e2m1[1x16]*f32:mse", "ternary"]
ONE = torch.tensor(1.0)


@functools.cache
def grid_of(name: str) -> list[float]:
    item = element(name)
    return sorted({v for code in item.codes if item.min <= (v := item.decode(code) + 0.0)
                   <= item.max})


def boundary_of(name: str, index: int) -> float:
    """Where rounding changes between the values number ``index`` and the next."""
    item, grid = element(name), grid_of(name)
    a, b = grid[index], grid[index + 1]
    if isinstance(item, CodebookElement) and item.logarithmic:
        return math.sqrt(a * b)
    return (a + b) / 2


def dge_slope(u: float, name: str, k: float) -> float:
    """min((1/k)·|z|^(1/k-1), 3) in the interval of u, 0 beyond the range."""
    grid = grid_of(name)
    if not grid[0] <= u <= grid[-1]:
        return 0.0
    index = min(bisect.bisect_right(grid, u), len(grid) - 1) - 1
    middle = boundary_of(name, index)
    end = grid[index] if u < middle else grid[index + 1]
    z = abs((u - middle) / (end - middle))
    return 3.0 if z == 0 and k > 1 else min(z ** (1 / k - 1) / k, 3.0)


def in_units(name: str, gradient: Tensor, units: Tensor, item: str) -> Tensor:
    """An estimator with a scale of 1, so that u = x exactly."""
    return backward(name, gradient, units, f"{item}[tensor]*f32", scales=[ONE])


def samples(item: str, count: int = 400) -> Tensor:
    """float64: grid points, boundaries, random values inside and beyond."""
    grid = grid_of(item)[-200:] + grid_of(item)[:200]
    middles = [boundary_of(item, i) for i in range(min(len(grid_of(item)) - 1, 200))]
    low, high = grid_of(item)[0], grid_of(item)[-1]
    random = torch.rand(count, dtype=torch.float64) * (high - low) * 1.2 + low - 0.1 * (high - low)
    ends = [math.nextafter(high, math.inf), math.nextafter(low, -math.inf), high * 2, -2 * high]
    return torch.cat([torch.tensor(grid + middles + ends, dtype=torch.float64), random])


# --- DGE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", ELEMENTS)
@pytest.mark.parametrize("k", [1.0, 2.0, 5.0])
def test_dge_is_its_formula_at_every_kind_of_point(item: str, k: float) -> None:
    u = samples(item)
    g = torch.randn(len(u), dtype=torch.float64)
    expected = torch.tensor([dge_slope(float(v), item, k) for v in u], dtype=g.dtype) * g
    found = in_units(f"dge-clipped:{k}", g, u, item)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("item", ["e2m1", "e4m3", "int4", "nf4", "log2u4"])
def test_the_mean_over_every_interval_is_1_or_as_published_0_593(item: str) -> None:
    grid = grid_of(item)
    for index in range(0, len(grid) - 1, max(len(grid) // 20, 1)):
        a, b, c = grid[index], boundary_of(item, index), grid[index + 1]
        steps = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
        means = []
        for name in ("dge", "dge-clipped"):
            sides = [in_units(name, torch.ones_like(steps), low + steps * (high - low), item).mean()
                     for low, high in ((a, b), (b, c))]
            means.append(float((sides[0] * (b - a) + sides[1] * (c - b)) / (c - a)))
        assert means[0] == pytest.approx(1.0, abs=2e-4)
        assert means[1] == pytest.approx(0.593, abs=6e-4)


def test_a_number_close_to_1_is_nearly_straight_through_and_finite() -> None:
    u = torch.tensor([0.5, 0.1, -2.5, 3.0])
    found = in_units("dge-clipped:1.0001", torch.ones(4), u, "int4")
    torch.testing.assert_close(found, torch.ones(4), rtol=1e-2, atol=0)


def test_dge_is_the_derivative_of_its_smooth_steps() -> None:
    """f(t) = Δ/2·(1 + sign(2t/Δ - 1)·|2t/Δ - 1|^(1/k)), differentiated by autograd."""
    t = torch.rand(1000, dtype=torch.float64).requires_grad_()
    z = 2 * t - 1
    f = 2.0 + 0.5 * (1 + z.sign() * z.abs() ** (1 / 5))
    (slope,) = torch.autograd.grad(f.sum(), t)
    u = 2.0 + t.detach()  # int4: intervals of width 1
    found = in_units("dge-clipped", torch.ones_like(u), u, "int4")
    torch.testing.assert_close(found, slope.clamp(max=3.0), rtol=1e-9, atol=0)
    unclipped = slope < 3
    normal = in_units("dge", torch.ones_like(u), u, "int4")
    torch.testing.assert_close(normal[unclipped], (slope / dge_mean(5))[unclipped])


@pytest.mark.parametrize("k", [1.0, 1.5, 2.0, 5.0])
def test_the_mean_is_the_integral(k: float) -> None:
    z = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    integral = (z ** (1 / k - 1) / k).clamp(max=3.0).mean()
    assert dge_mean(k) == pytest.approx(float(integral), rel=1e-5)
    assert dge_mean(k, 1e9) == pytest.approx(1.0, abs=1e-2)


# --- clipped, tanh, ste --------------------------------------------------------------------------


@pytest.mark.parametrize("item", ELEMENTS)
def test_clipped_to_the_last_bit_of_both_ends(item: str) -> None:
    u, (low, high) = samples(item), (element(item).min, element(item).max)
    g = torch.randn(len(u), dtype=torch.float64)
    closed = [float(a) if low <= v <= high else 0.0 for a, v in zip(g, u.tolist(), strict=True)]
    opened = [float(a) if low < v < high else 0.0 for a, v in zip(g, u.tolist(), strict=True)]
    assert in_units("clipped", g, u, item).tolist() == closed
    assert in_units("clipped-open", g, u, item).tolist() == opened
    assert torch.equal(in_units("ste", g, u, item), g)


def test_a_zero_point_moves_the_range() -> None:
    u = torch.tensor([[-3.5, -3.0, 0.0, 12.0, 12.5]])
    scales = [torch.ones(1, 1), torch.full((1, 1), 3.0)]
    found = backward("clipped", torch.ones(1, 5), u, "int4[row]*f32+zp", scales=scales)
    assert found.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    found = backward("dge-clipped", torch.ones(1, 5), u, "int4[row]*f32+zp", scales=scales)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.2, 0.2, 0.2, 0.0]]))


@pytest.mark.parametrize("c", [0.5, 3.0])
def test_tanh_forward_and_its_derivative(c: float) -> None:
    x = (torch.randn(64, 32, dtype=torch.float64) * 3).requires_grad_()
    g = torch.randn(64, 32, dtype=torch.float64)
    soft = c * torch.tanh(x / c)
    (expected,) = torch.autograd.grad(soft, x, g)
    name = f"tanh:{c}"
    torch.testing.assert_close(forward(name, x.detach(), "int4[tensor]*f32"), soft.detach())
    torch.testing.assert_close(backward(name, g, x.detach(), "int4[tensor]*f32"), expected)


def test_tanh_bounds_what_is_quantized_and_is_3_unless_stated() -> None:
    x = torch.tensor([-1e30, -1.0, 0.0, 1e30])
    assert forward("tanh", x, "int4[tensor]*f32").tolist() == pytest.approx(
        [-3.0, -3 * math.tanh(1 / 3), 0.0, 3.0])
    assert forward("ste", x, "int4[tensor]*f32") is x


# --- absmax --------------------------------------------------------------------------------------


def nearest_value(u: Tensor, item: str) -> Tensor:
    """Q(u) of float64 values that are on no boundary, by looking at every value."""
    grid = torch.tensor(grid_of(item), dtype=u.dtype)
    return grid[(u[..., None] - grid).abs().argmin(-1)]


def composition(x: Tensor, d: Tensor, item: str) -> Tensor:
    """d·Q(x/d), Q' = 1 in range and 0 beyond, for autograd."""
    u = x / d
    value = nearest_value(u.detach(), item)
    inside = (u.detach().abs() <= element(item).max).to(x.dtype)
    return d * (u * inside + (value - u * inside).detach())


@pytest.mark.parametrize("item", ["e2m1", "int4", "e4m3"])
def test_absmax_is_autograd_through_the_scale(item: str) -> None:
    x = torch.randn(6, 48, dtype=torch.float64)
    g = torch.randn(6, 48, dtype=torch.float64)
    blocks = x.view(6, 3, 16).clone().requires_grad_()
    # the scale that the format stores is float32: its value, and the derivative of amax/max
    exact = blocks.abs().amax(-1, keepdim=True) / element(item).max
    stored = exact.detach().float().double()
    d = exact + (stored - exact).detach()
    (expected,) = torch.autograd.grad(composition(blocks, d, item), blocks, g.view(6, 3, 16))
    found = backward("absmax", g, x, f"{item}[1x16]*f32")
    torch.testing.assert_close(found, expected.view(6, 48), rtol=1e-6, atol=1e-9)


def test_absmax_is_the_change_of_the_whole_block_when_its_largest_element_moves() -> None:
    """Finite differences of Σ g·x̂ without STE give Σ gᵢ·Q(uᵢ)/max; the straight-through terms are
    added by hand: g_j - Σ gᵢ·uᵢ/max."""
    x = torch.tensor([[0.3, -1.7, 5.3, 0.9, -2.2, 3.4, 0.05, -4.1]], dtype=torch.float64)
    g = torch.randn(1, 8, dtype=torch.float64)
    moved, step = x.clone(), 1e-3
    moved[0, 2] += step
    fmt, scale = "e2m1[row]*f32", (lambda x: x.abs().max() / 6)

    def loss(x: Tensor) -> Tensor:
        d = scale(x)
        return (g * d * nearest_value(x / d, "e2m1")).sum()

    change = (loss(moved) - loss(x)) / step
    expected = change + g[0, 2] - (g * x / scale(x)).sum() / 6
    found = backward("absmax", g, x, fmt)
    assert float(found[0, 2]) == pytest.approx(float(expected), rel=1e-5)
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(found[0, others], g[0, others])


def test_ties_share_the_gradient_of_the_largest_as_torch_amax_does() -> None:
    x = torch.tensor([[6.0, -6.0, 2.4, 6.0, 0.7]], dtype=torch.float64)
    g = torch.tensor([[1.0, 2.0, -3.0, 0.5, 4.0]], dtype=torch.float64)
    total = g[0, 2] * (2.0 - 2.4) + g[0, 4] * (0.5 - 0.7)
    expected = g.clone()
    expected[0, 0] += total / 6 / 3
    expected[0, 1] -= total / 6 / 3
    expected[0, 3] += total / 6 / 3
    torch.testing.assert_close(backward("absmax", g, x, "e2m1[row]*f32"), expected)


def test_floor_scales_have_no_slope_unless_asked_for() -> None:
    """Blocks with a mantissa above 1.5 saturate: there Q' = 0."""
    x = torch.randn(8, 32, dtype=torch.float64)
    x[:, 5] = torch.linspace(4.1, 7.9, 8, dtype=torch.float64)
    g = torch.randn(8, 32, dtype=torch.float64)
    assert torch.equal(backward("absmax", g, x, "mxfp4"), backward("clipped", g, x, "mxfp4"))
    leaf = x.clone().requires_grad_()
    amax = leaf.abs().amax(-1, keepdim=True)
    power = 2.0 ** (torch.floor(torch.log2(amax.detach())) - 2)
    d = amax * (power / amax.detach())  # straight through the floor of log2: d' = d/amax
    (expected,) = torch.autograd.grad(composition(leaf, d, "e2m1"), leaf, g)
    torch.testing.assert_close(backward("absmax-ste", g, x, "mxfp4"), expected)
    assert not torch.equal(expected, backward("absmax", g, x, "mxfp4"))


def test_nvfp4_goes_straight_through_e4m3_and_holds_the_tensor_scale() -> None:
    x, g = torch.randn(4, 32), torch.randn(4, 32)
    q = quantize(x, "nvfp4")
    d = q.scale.double().repeat_interleave(16, -1) * float(q.tensor_scale)
    u = x.double() / d
    error = torch.where(u.abs() <= 6, nearest_value(u, "e2m1") - u, nearest_value(u, "e2m1"))
    expected = torch.where(u.abs() <= 6, g.double(), 0.0)
    for row in range(4):
        for block in range(2):
            part = slice(16 * block, 16 * block + 16)
            j = 16 * block + int(x[row, part].abs().argmax())
            total = (g[row, part].double() * error[row, part]).sum()
            expected[row, j] += x[row, j].double().sign() * total / 6
    torch.testing.assert_close(backward("absmax", g, x, "nvfp4").double(), expected,
                               rtol=1e-5, atol=1e-5)


def test_given_scales_have_no_slope() -> None:
    x, g = torch.randn(4, 32), torch.randn(4, 32)
    scales = [torch.full((4, 1), 0.3)]
    found = backward("absmax", g, x, "e2m1[row]*f32", scales=scales)
    assert torch.equal(found, torch.where((x / 0.3).abs() <= 6, g, 0.0))


@pytest.mark.parametrize("options", [
    dict(tensor_amax=torch.tensor(2.0)), dict(headroom=17 / 16), dict(prescale=0.75),
    dict(tensor_amax=torch.tensor(2.0), headroom=17 / 16, prescale=0.75)], ids=str)
@pytest.mark.parametrize("fmt", ["e2m1[tensor]*f32", "nvfp4"])
def test_scales_are_those_that_the_operand_was_quantized_at(fmt: str, options: dict) -> None:
    """u = x·prescale/d, d of the amax given or found, times headroom; x̂ = d·Q(u)/prescale."""
    x, g = torch.randn(4, 32) * 1.5, torch.randn(4, 32)
    room, part = options.get("headroom", 1.0), options.get("prescale", 1.0)
    whole = float(options.get("tensor_amax", x.abs().max())) * room
    blocks = x.double().view(4, 2, 16) if fmt == "nvfp4" else x.double().view(1, 1, 128)
    amax = blocks.abs().amax(-1, keepdim=True) * room
    if fmt == "nvfp4":
        codes = (amax * 448 / whole).clamp(max=448).float().to(torch.float8_e4m3fn).double()
        d, slope = codes * whole / 2688, torch.where(amax > whole, 0.0, room / 6)
    else:
        d = torch.full_like(amax, whole / 6)
        slope = torch.full_like(amax, 0.0 if "tensor_amax" in options else room / 6)
    u = blocks * part / d
    inside = (u.abs() <= 6).double()
    grouped = g.double().view(blocks.shape)
    clipped = (grouped * inside).view(4, 32)
    assert torch.equal(backward("clipped", g, x, fmt, **options).double(), clipped)
    assert bool((clipped == 0).any()) == ("tensor_amax" in options)
    error = (nearest_value(u.clamp(-6, 6), "e2m1") - u * inside) / part
    largest = (blocks.abs() == blocks.abs().amax(-1, keepdim=True)) * blocks.sign()
    absmax = grouped * inside + largest * slope * (grouped * error).sum(-1, keepdim=True)
    torch.testing.assert_close(backward("absmax", g, x, fmt, **options).double(),
                               absmax.view(4, 32), rtol=1e-4, atol=1e-5)
    steps = torch.tensor([dge_slope(float(v), "e2m1", 5.0) for v in u.flatten()])
    torch.testing.assert_close(backward("dge-clipped", g, x, fmt, **options),
                               (grouped.flatten() * steps).float().view(4, 32), rtol=1e-3,
                               atol=1e-4)


def test_a_scale_at_its_bound_and_the_scale_of_what_underflows_have_no_slope() -> None:
    g = torch.tensor([[1.0, 1.0]])
    for values in ([[3e4, 1e4]], [[1e-9, 4e-10]]):  # e4m3 scales end at 448; float16 ones at 6e-8
        x = torch.tensor(values)
        fmt = "e2m1[row]*e4m3" if values[0][0] > 1 else "e2m1[row]*f16"
        expected = backward("clipped", g, x, fmt)
        assert torch.equal(backward("absmax", g, x, fmt), expected)


# --- every estimator -----------------------------------------------------------------------------

NAMES = list(ESTIMATORS)


CASES = [(name, fmt) for name in NAMES for fmt in BLOCKED
         if not (name.startswith("absmax") and ("+zp" in fmt or fmt == "ternary"))]  # refused


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_blocks_of_the_transpose_and_of_ragged_lengths(name: str, fmt: str) -> None:
    x, g = torch.randn(5, 40, 24), torch.randn(5, 40, 24)
    along = backward(name, g, x, fmt, axis=1)
    moved = backward(name, g.movedim(1, -1), x.movedim(1, -1), fmt)
    torch.testing.assert_close(along, moved.movedim(-1, 1))
    assert along.shape == x.shape and along.isfinite().all()
    ragged = backward(name, g[..., :21], x[..., :21], fmt)
    zeros = torch.nn.functional.pad(x[..., :21], (0, 11))
    padded = backward(name, torch.nn.functional.pad(g[..., :21], (0, 11)), zeros, fmt)
    if "channel" not in fmt and fmt != "ternary":
        torch.testing.assert_close(ragged, padded[..., :21])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_widened_and_the_gradient_keeps_its_dtype(name, dtype) -> None:
    x, g = torch.randn(4, 32).to(dtype), torch.randn(4, 32)
    wide = backward(name, g, x.float(), "nvfp4")
    assert torch.equal(backward(name, g, x, "nvfp4"), wide)
    assert backward(name, g.to(dtype), x, "nvfp4").dtype == dtype
    assert forward(name, x, "nvfp4").dtype == dtype


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_zero_blocks_and_empty_tensors(name: str, fmt: str) -> None:
    g = torch.randn(4, 64)
    found = backward(name, g, torch.zeros(4, 64), fmt)
    assert found.isfinite().all()
    if name == "clipped-open" and "+zp" in fmt:
        assert torch.equal(found, g * 0)  # the range of zeros with a zero point begins at 0
    elif not name.startswith("dge"):
        assert torch.equal(found, g)  # 0 is in range, and an amax of 0 has no sign
    else:  # 0 is on the grid: the end of an interval
        mean = dge_mean(5) if name == "dge" else 1.0
        torch.testing.assert_close(found, g * (0.2 / mean))
    assert backward(name, torch.zeros(0, 64), torch.zeros(0, 64), fmt).shape == (0, 64)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_visible_in_their_block_and_only_there(bad: float) -> None:
    x, g = torch.randn(2, 64), torch.randn(2, 64)
    clean = {name: backward(name, g, x, "mxfp4") for name in NAMES}
    x[0, 3] = bad
    assert fake_quantize(x, "mxfp4")[0, :32].isnan().all()
    for name in NAMES:
        found = backward(name, g, x, "mxfp4")
        assert torch.equal(found[0, 32:], clean[name][0, 32:])
        assert torch.equal(found[1], clean[name][1])
        if name in ("absmax", "absmax-ste", "dge", "dge-clipped"):
            assert found[0, :32].isnan().all()
        elif name != "tanh":
            assert torch.equal(found[0, :32], g[0, :32])


@pytest.mark.parametrize("name", NAMES)
def test_an_infinite_gradient_is_not_hidden(name: str) -> None:
    """What finds overflowing gradients must see them."""
    g = torch.zeros(1, 32)
    g[0, 7] = math.inf
    for value in (0.5, 100.0):
        x = torch.full((1, 32), value)
        found = backward(name, g, x, "e2m1[row]*f32", scales=[torch.ones(1, 1)])
        assert not found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_traces_with_symbolic_sizes_to_plain_aten(name: str) -> None:
    def run(g: Tensor, x: Tensor) -> Tensor:
        return backward(name, g, forward(name, x, "nvfp4", -1), "nvfp4")

    g, x = torch.randn(6, 48), torch.randn(6, 48)
    traced = make_fx(run, tracing_mode="symbolic")(g, x)
    more = (torch.randn(9, 80), torch.randn(9, 80))
    assert torch.equal(traced(*more), run(*more))
    targets = {str(node.target) for node in traced.graph.nodes if node.op == "call_function"}
    assert not any("item" in target or "local_scalar" in target for target in targets)


def test_compiled_as_eager() -> None:
    def run(g: Tensor, x: Tensor) -> list[Tensor]:
        return [backward(name, g, x, fmt) for name, fmt in
                (("clipped", "mxfp4"), ("absmax", "nvfp4"), ("dge", "e2m1[row]*f32"))]

    g, x = torch.randn(16, 64), torch.randn(16, 64)
    for found, expected in zip(torch.compile(run)(g, x), run(g, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- names and refusals --------------------------------------------------------------------------


def test_names_carry_a_number() -> None:
    assert parse_estimator("dge")[1] == 5.0
    assert parse_estimator("dge:3")[1] == 3.0
    assert parse_estimator("tanh:0.5")[1] == 0.5
    assert parse_estimator("ste")[0] is ESTIMATORS["ste"]
    assert all(found.name == name for name, found in ESTIMATORS.items())


@pytest.mark.parametrize(("name", "message"), [
    ("dqe", "did you mean dge"), ("absmx", "did you mean absmax"), ("", "unknown estimator"),
    ("ste:3", "takes no number"), ("dge:", "at least 1"), ("dge:0.5", "at least 1"),
    ("dge:nan", "at least 1"), ("tanh:0", "above 0"), ("tanh:inf", "above 0"),
    ("dge:five", "'dge:5'"),
])
def test_unknown_names_and_numbers(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_estimator(name)
    with pytest.raises(ConfigError, match=message):
        backward(name, torch.ones(1, 4), torch.ones(1, 4), "int4")


@pytest.mark.parametrize("fmt", ["int4[row]*f32+zp", "ternary", "mxfp4:rms"])
def test_absmax_needs_a_scale_that_follows_amax(fmt: str) -> None:
    with pytest.raises(ConfigError, match="use 'clipped'"):
        backward("absmax", torch.ones(1, 4), torch.ones(1, 4), fmt)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(FormatError, match="gradient has shape"):
        backward("ste", torch.ones(4, 2), x, "int4")
    with pytest.raises(FormatError, match="did you mean"):
        backward("ste", x, x, "mxfp5")
    with pytest.raises(FormatError, match="cannot quantize"):
        backward("ste", x, torch.ones(2, 4, dtype=torch.int32), "int4")
    with pytest.raises(FormatError, match="axis"):
        forward("tanh", x, "int4", axis=2)
