"""Coverage: formulas say what a rule says, and core ATen is all there, gaps included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from scaleprop.cli.listing import rule_table, rules, rules_markdown
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
    assert by_op["aten.convolution_backward.default"].contraction == "gradients of conv"
    assert by_op["aten.addmm.default"].high == rule_for(aten.addmm.default).high
    assert all(line.family and not line.count for line in by_op.values())
    assert by_op["aten.sigmoid.default"].bounded and not by_op["aten.relu.default"].bounded
    assert by_op["aten.rsqrt.default"].degree == -0.5 and by_op["aten.mm.default"].degree is None
    assert by_op["aten.mm.default"].moments and not by_op["aten.argmax.default"].moments


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


def test_the_table_has_every_answer_and_the_document_is_up_to_date():
    lines = [dataclasses.asdict(line) for line in coverage()]
    columns, cells = rule_table(lines)
    assert {"moments", "bounded", "degree", "homogeneity", "axes", "moves"} <= set(columns)
    (row,) = [dict(zip(columns, row, strict=True)) for row in cells if "aten.rsqrt" in row[0]]
    assert (row["moments"], row["bounded"], row["degree"]) == ("yes", "", "-0.5")
    document = (Path(__file__).parents[2] / "docs/rules.md").read_text()
    assert rules_markdown(rules()) == document, "run `scaleprop rules --markdown docs/rules.md`"
