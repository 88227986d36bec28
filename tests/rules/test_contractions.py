"""Contractions of operators of several spellings and of gradients: axes against numbers, places
against schemas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from scaleprop.passes.assign import AssignFormats, assignment_of
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.recipes import named_recipe
from scaleprop.rules import contraction_behind, contraction_of, rule_for

aten: Any = torch.ops.aten


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_sums_over_the_axes_that_its_contraction_names(rank: int, transposed: bool):
    sizes = (3, 5) if transposed else (5, 3)  # of 3 channels in, 5 out
    x = torch.ones(2, 3, *[6] * rank, dtype=torch.float64)
    weight = torch.ones(*sizes, *range(2, 2 + rank), dtype=torch.float64)
    graph = torch.fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "w")]
    rest = None, [1] * rank, [0] * rank, [1] * rank, transposed, [0] * rank, 1
    node = graph.call_function(aten.convolution.default, (*nodes, *rest))
    for place, value in zip(nodes, (x, weight), strict=True):
        place.meta["val"] = value
    places = {operand.role: operand for operand in contraction_of(node).operands}
    summed = weight.shape.numel() / 5
    assert aten.convolution(x, weight, *rest).max() == summed  # of ones, away from the border
    assert math.prod(weight.shape[axis] for axis in places["weight"].axes) == summed
    assert [x.shape[axis] for axis in places["activation"].axes] == [3]
    if not transposed:
        spelled = getattr(aten, f"conv{rank}d").default
        assert contraction_of(node) == rule_for(spelled).contraction


def test_gradients_name_the_contraction_they_are_of():
    rule = rule_for(aten.convolution_backward.default)
    schema = rule.op._schema.arguments
    assert [(schema[o.argument].name, o.role) for o in rule.gradient_of.operands] == [
        ("grad_output", "gradient"), ("input", "activation"), ("weight", "weight")]
    graph = torch.fx.Graph()
    node = graph.call_function(rule.op, ())
    assert contraction_of(node) is None and contraction_behind(node) is rule.gradient_of
    other = graph.call_function(aten.relu.default, ())
    assert contraction_behind(other) is None and contraction_behind(graph.placeholder("x")) is None


def test_formats_are_not_compared_where_a_weights_rows_are_summed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2))
    report = scaleprop.analyze(model, (torch.randn(1, 3, 6, 6),))
    assert {record.op for record in report.records} == {"aten.conv2d.default"}


@pytest.mark.parametrize("recipe", ["int8-dynamic", "fp8"])
def test_a_transposed_convolution_gets_no_format_and_both_operands_say_why(recipe: str):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 5, 2))
    program = capture(model, (torch.randn(1, 3, 6, 6),))
    for each in (CleanUp(), Canonicalise(), AssignFormats(named_recipe(recipe))):
        program = each.run(program).program
    (node,) = program.module.graph.find_nodes(op="call_function", target=aten.convolution.default)
    assert contraction_of(node).kind == "conv" and assignment_of(node) is None
    found = [record for record in program.records if record.node == node.name]
    assert [record.role for record in found] == ["fprop.x", "fprop.w"]
    assert {record.reason for record in found} == {
        "a transposed convolution runs in high precision"}
    assert found[1].nbytes == model[1].weight.numel() * 4
