"""Which kernel a linear gets, decided without compiling anything."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from scaleprop import ops
from scaleprop.backends.inductor import linears
from scaleprop.backends.inductor.constants import constants_of
from scaleprop.backends.inductor.linears import Linear
from scaleprop.errors import LoweringError
from scaleprop.passes.base import Program

from .small_programs import Block, Mlp, Pictures, program


def planned(made: Program, compute: torch.dtype = torch.float32) -> list[Linear]:
    return linears.plan(made.module.graph, constants_of(made.module), compute)


def described(plan: Sequence[Linear]) -> list[str]:
    return [linear.description for linear in plan]


def test_projections_of_one_input_are_merged_for_few_rows():
    plan = planned(program(Block(), (torch.randn(1, 8, 64),), "int8-dynamic"))
    widths = [[stop - start for _, start, stop in linear.members] for linear in plan]
    assert widths == [[64, 64, 64], [64], [128], [64]]
    assert plan[0].constants["bias"].shape == (192,)
    assert bool((plan[0].constants["bias"].tensor[128:] == 0).all())  # v has no bias


def test_for_many_rows_attention_s_inputs_stay_apart_unless_it_is_narrow():
    made = program(Block(), (torch.randn(2, 300, 64),), "int8-dynamic")
    assert len(planned(made)) == 6
    assert len(planned(made, torch.bfloat16)) == 4


def test_epilogues_of_static_and_dynamic_int8():
    x = (torch.randn(5, 64),)
    assert described(planned(program(Mlp(), x, "int8"))) == [
        "oneDNN qlinear u8×s8 static+gelu+quantize", "oneDNN qlinear u8×s8 static"]
    assert described(planned(program(Mlp(), x, "int8-dynamic"))) == [
        "oneDNN qlinear u8×s8 per tensor+gelu", "oneDNN qlinear u8×s8 per tensor"]
    assert described(planned(program(Mlp(), x, "int8-token"))) == [
        "oneDNN qlinear s8×s8 per token"] * 2


class Residual(nn.Module):
    """x + up(x), and additions that must not be taken for one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        first = x + self.a(x)
        broadcast = self.b(first) + row
        doubled = self.c(broadcast)
        return doubled + doubled


def test_only_true_residuals_are_added_in_the_kernel():
    made = program(Residual(), (torch.randn(3, 32), torch.randn(32)), "int8-dynamic")
    assert [linear.epilogue.add is not None for linear in planned(made)] == [True, False, False]


class Residuals(nn.Module):
    """Sums whose other operand may hold them, and two that must not be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = x + self.a(x)  # the caller's
        second = first + self.b(self.norm(first))
        normal = self.norm(second)
        third = normal + self.c(normal)
        fourth = third + self.d(third)
        return fourth, third.view(-1)  # third is still read


def test_residuals_are_added_in_place_where_nobody_reads_them_later():
    made = program(Residuals(), (torch.randn(3, 32),), "int8")
    plan = planned(made)
    assert all(linear.epilogue.add is not None for linear in plan)
    assert [linear.epilogue.in_place for linear in plan] == [False, True, True, False]


class Tail(nn.Module):
    """A GELU that someone else reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = nn.functional.gelu(self.a(x), approximate="tanh")
        return self.b(y), y


def test_an_activation_with_two_readers_is_fused_but_not_its_quantization():
    first, _ = planned(program(Tail(), (torch.randn(3, 32),), "int8"))
    assert first.epilogue.algorithm == "tanh"
    assert first.epilogue.quantize is None


def test_without_vnni_bytes_are_not_multiplied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linears, "int8_sums_are_exact", lambda: False)
    kinds = {linear.kind for linear in planned(program(Mlp(), (torch.randn(5, 64),), "int8"))}
    assert kinds == {"float"}


def test_without_fp8_kernels_weights_are_dequantized(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linears, "fp8_linears_run", lambda: False)
    plan = planned(program(Mlp(), (torch.randn(5, 64),), "fp8"))
    assert [linear.kind for linear in plan] == ["float", "float"]
    assert plan[0].constants["weight"].dtype == torch.float32


def test_constants_fold_convolution_weights_but_no_lookup():
    made = program(Pictures(), (torch.arange(6),), "int8-dynamic")
    known = constants_of(made.module)
    folded = {node.target for node in known if node.op == "call_function"}
    assert ops.dequantize in folded
    lookups = [node for node in made.module.graph.nodes
               if node.target is torch.ops.aten.index.Tensor]
    assert lookups and not any(node in known for node in lookups)


def test_a_scaled_mm_of_another_form_is_refused():
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(ops.scaled_mm, ([x, x], [w], None, "mxfp4", "mxfp4", 32))
    with pytest.raises(LoweringError, match=r"node 'scaled_mm_default' .*backend='reference'"):
        linears.read(node)
