"""Coverage: formulas say what a rule says, and core ATen is all there, gaps included."""

from __future__ import annotations

import pytest
import torch

from scaleprop.rules import Homogeneity, core_operators, coverage, rule_for
from scaleprop.rules.base import formula

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("law", "want"),
    [
        (None, ""),
        (Homogeneity(), "1"),
        (Homogeneity({0: 1, 1: -1}), "x0^1*x1^-1"),
        (Homogeneity(follows=(0, 1)), "follows x0 and x1"),
        (Homogeneity({0: 1, 1: 1}, follows=(2,)), "x0^1*x1^1, follows x2"),
        (Homogeneity({0: 0}, exact=False), "x0^0, up to a constant"),
        (Homogeneity(outputs=({0: 2}, {0: 1})), "y0: x0^2; y1: x0^1"),
        (lambda node: None, "depends on constants"),
    ],
)
def test_formulas(law, want):
    assert formula(law) == want


def test_a_line_says_what_the_rule_says():
    (line,) = [line for line in coverage([aten.view.default]) if line.count]
    assert (line.family, line.homogeneity, line.axes, line.moves) == (
        "movement", "x0^1", True, True)
    by_op = {line.op: line for line in coverage()}
    assert by_op["aten.addmm.default"].contraction == "matmul"
    assert by_op["aten.addmm.default"].high == rule_for(aten.addmm.default).high
    assert all(line.family and not line.count for line in by_op.values())


def test_operators_can_be_listed_without_being_counted():
    counted = coverage([aten.erfinv.default], also=[aten.erfinv.default, aten.igamma.default])
    gaps = [(line.op, line.count) for line in counted if line.family is None]
    assert gaps == [("aten.erfinv.default", 1), ("aten.igamma.default", 0)]
    assert counted[-2:] == tuple(line for line in counted if line.family is None)


def test_core_operators_are_tagged_and_write_nothing():
    core = core_operators()
    assert len(core) == len(set(core)) > 150
    assert {aten.convolution.default, aten.avg_pool1d.default, aten.add.Tensor} <= set(core)
    assert not {aten.linear.default, aten.resize_.default, aten.atan2.out} & set(core)
    assert all(torch.Tag.core in op.tags for op in core)
