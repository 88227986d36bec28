"""Runtime smooth: s against the paper's grouping in loops, both forms of the sum, two backends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.passes.methods.runtime_smooth import RuntimeSmooth
from scaleprop.recipes import Recipe
from scaleprop.recipes.base import Role

INT4 = "int4[row]*f32"


def recipe(**roles: Role) -> Recipe:
    return Recipe(name="test", description="", roles={k.replace("_", "."): v
                                                      for k, v in roles.items()})


W4A4 = recipe(fprop_x=Role(format=INT4), fprop_w=Role(format=INT4))


class Pair(nn.Module):
    """Two linears that read the same value, and one that reads another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.left = nn.Linear(size, 24)
        self.right = nn.Linear(size, 24, bias=False)
        self.last = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.left(x) * self.right(x)))


def magnitudes(x: torch.Tensor, group: int, reorder: bool) -> list[float]:
    """s of each channel of x [tokens, K], in loops."""
    reached = [max(abs(float(row[j])) for row in x) for j in range(x.shape[1])]
    order = list(range(len(reached)))
    if reorder:
        order.sort(key=lambda j: (-reached[j], j))
    found = [0.0] * len(reached)
    for start in range(0, len(order), group):
        members = order[start : start + group]
        for j in members:
            found[j] = max(reached[i] for i in members)
    return found


def data(size: int = 48) -> tuple[Pair, torch.Tensor]:
    torch.manual_seed(3)
    model, x = Pair(size).eval(), torch.randn(2, 20, size)
    x[..., [5, 30]] *= 60
    with torch.no_grad():
        for linear in (model.left, model.right):
            linear.weight[:, [5, 30]] /= 60
    return model, x


def run(model: nn.Module, x: torch.Tensor, *passes: str, backend: str = "reference",
        which: Recipe = W4A4) -> torch.Tensor:
    return scaleprop.compile(model, (x,), recipe=which, passes=passes, backend=backend)(x)


@pytest.mark.parametrize(("group", "reorder", "used"), [
    (1, True, 1), (8, True, 8), (8, False, 8), (128, True, 48), (7, False, 6)])
def test_one_linear_is_the_papers_sum_over_groups(group: int, reorder: bool, used: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(48, 10).eval(), torch.randn(3, 7, 48)
    x[..., 11] *= 40
    x[..., 4] = 0
    got = run(model, x, f"runtime-smooth{{group={group},reorder={str(reorder).lower()}}}")
    s = torch.tensor(magnitudes(x.reshape(-1, 48), used, reorder)).clamp_min(1e-38)
    codes = fake_quantize(x.reshape(-1, 48) / s, INT4).double()
    weight = fake_quantize(model.weight.detach(), INT4).double()
    # the kernel's form: partial sums of channels with the same s, each times it
    want = torch.zeros(21, 10, dtype=torch.float64)
    for value in sorted(set(s.tolist())):
        block = s == value
        want += value * (codes[:, block] @ weight[:, block].T)
    want += model.bias.detach().double()
    torch.testing.assert_close(got.reshape(-1, 10).double(), want, rtol=1e-6, atol=1e-6)


def test_without_rounding_nothing_changes() -> None:
    """In float64, with operators of rounding taken out, the program is the model."""
    model, x = data()
    program = scaleprop.compile(model, (x,), recipe=recipe(fprop_x=Role(format=INT4)),
                                passes=["runtime-smooth{group=16}"], backend="reference").program
    kept = 0
    for node in list(program.module.graph.nodes):
        if node.target is scaleprop.ops.fake_quantize:
            node.replace_all_uses_with(node.args[0])
            kept += 1
        if node.op == "call_function" and node.target is scaleprop.ops.scaled_mm:
            (parts, weights, bias), other = node.args[:3], node
            with program.module.graph.inserting_before(node):
                new = program.module.graph.call_function(torch.ops.aten.linear.default,
                                                         (parts[0], weights[0], bias))
            other.replace_all_uses_with(new)
    program.module.recompile()
    wide = program.module.double()
    want = model.double()(x.double())
    assert kept == 2
    torch.testing.assert_close(wide(x.double()), want, rtol=1e-12, atol=1e-12)


def test_outliers_of_channels_cost_less_and_less() -> None:
    model, x = data()
    want = model(x)

    def error(*passes: str) -> float:
        return float((run(model, x, *passes) - want).norm() / want.norm())

    plain, coarse, fine = (error(), error("runtime-smooth{group=16}"),
                           error("runtime-smooth{group=2}"))
    neighbours = error("runtime-smooth{group=16,reorder=false}")
    assert fine < coarse < neighbours < plain
    assert fine < plain / 3


def test_a_rotation_before_it_saves_the_victims_of_spikes() -> None:
    """RRS: a spike of one token makes its channel's magnitude too large for all other tokens."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 16).eval(), torch.randn(1, 40, 64)
    x[0, torch.arange(2), torch.arange(2) * 16] += 80  # one channel of each of two groups
    victims, want = slice(2, None), model(x)
    smooth = "runtime-smooth{group=16,reorder=false}"

    def error(*passes: str) -> float:
        return float((run(model, x, *passes) - want)[:, victims].norm() / want[:, victims].norm())

    assert error("rotate", smooth) < error(smooth) / 2


def test_onnxruntime_agrees() -> None:
    model, x = data()
    x[..., 9] = x[..., 10]  # equal magnitudes: their order is the same everywhere
    want = run(model, x, "runtime-smooth{group=6}")
    got = run(model, x, "runtime-smooth{group=6}", backend="onnxruntime")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_lengths_may_differ_from_the_examples() -> None:
    model, x = data()
    dims = ({1: torch.export.Dim("tokens", min=2, max=64)},)
    compiled = scaleprop.compile(model, (x,), recipe=W4A4, passes=["runtime-smooth{group=6}"],
                                 backend="reference", dynamic_shapes=dims)
    shorter = x[:, :9] * 3
    torch.testing.assert_close(compiled(shorter), run(model, shorter, "runtime-smooth{group=6}"))


def test_a_convolutions_channels_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Conv2d(12, 6, 3).eval(), torch.randn(2, 12, 9, 9)
    x[:, 4] *= 50
    with torch.no_grad():
        model.weight[:, 4] /= 50
    which = recipe(conv_x=Role(format="int4[tensor]*f32"))
    got, plain = run(model, x, "runtime-smooth{group=1}", which=which), run(model, x, which=which)
    s = x.abs().amax((0, 2, 3)).reshape(12, 1, 1)
    want = model(fake_quantize(x / s, "int4[tensor]*f32") * s)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    exact = model(x)
    assert (got - exact).norm() < (plain - exact).norm() / 3


def test_the_report_says_what_was_done_and_what_was_not() -> None:
    model, x = data()
    program = scaleprop.compile(model, (x,), recipe=W4A4, passes=["runtime-smooth"],
                                backend="reference").program
    found = [(record.format, record.decided_by) for record in program.records
             if record.role == "fprop.x" and record.format]
    assert found == [(INT4, "runtime-smooth")] * 3
    assert [bool(record.runtime) for record in program.transforms] == [True, True]

    static = recipe(fprop_x=Role(format="int8", scaling="static"), fprop_w=Role(format=INT4))
    program = scaleprop.compile(model, (x,), recipe=static, passes=["runtime-smooth"],
                                calibration=[(x,)], backend="reference").program
    assert all("static" in (record.refused or "") for record in program.transforms)
    assert len(program.transforms) == 2


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="group=0"):
        RuntimeSmooth(group=0)
    with pytest.raises(ConfigError, match="runtime"):
        RuntimeSmooth(runtime=False)
