"""Rules say the truth: homogeneity and axis maps are checked against the operators themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaleprop.errors import ConfigError
from scaleprop.passes.capture import capture
from scaleprop.rules import Rule, contraction_of, coverage, register, rule_for
from scaleprop.rules.axes import match_axes

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
M = Y[0]  # [3, 4]
IMAGE = torch.randn(2, 4, 6, 6, dtype=torch.float64)

# operator → arguments to try it with
EXAMPLES = {
    aten.linear.default: (X, M, M[:, 0]),
    aten.conv1d.default: (X, Y[:, :, :2], Y[0, :2, 0]),
    aten.conv2d.default: (IMAGE, IMAGE[:, :, :3, :3], IMAGE[0, 0, 0, :2]),
    aten.conv3d.default: (IMAGE[None], IMAGE[:, None, :2, :2, :2].expand(2, 2, 2, 2, 2)),
    aten.convolution.default: (X, Y[:, :, :2], None, [1], [0], [1], False, [0], 1),
    aten.embedding.default: (M, torch.tensor([0, 2])),
    aten.mm.default: (M, M.t()),
    aten.bmm.default: (X, Y.mT),
    aten.matmul.default: (X, M.t()),
    aten.addmm.default: (M[:, :3], M, M.t()),
    aten.baddbmm.default: (X[:, :, :3], X, Y.mT),
    aten.scaled_dot_product_attention.default: (X, Y, X + Y),
    aten.view.default: (X, [6, 4]),
    aten.reshape.default: (X, [6, 4]),
    aten.permute.default: (X, [2, 0, 1]),
    aten.transpose.int: (X, 0, 2),
    aten.unsqueeze.default: (X, 1),
    aten.expand.default: (X[:1], [2, 3, 4]),
    aten.clone.default: (X,),
    aten.alias.default: (X,),
    aten.squeeze.dims: (X[:1], [0]),
    aten.slice.Tensor: (X, 1, 0, 2),
    aten.select.int: (X, 1, 0),
    aten.index.Tensor: (X, [torch.tensor([1, 0])]),
    aten.index_select.default: (X, 1, torch.tensor([2])),
    aten.gather.default: (X, 1, torch.zeros(2, 1, 4, dtype=torch.int64)),
    aten.split_with_sizes.default: (X, [1, 3], -1),
    aten.split.Tensor: (X, 2, -1),
    aten.unbind.int: (X, 1),
    aten.constant_pad_nd.default: (X, [1, 1]),
    aten.repeat.default: (X, [1, 2, 1]),
    aten.flip.default: (X, [0]),
    aten.tril.default: (X,),
    aten.triu.default: (X,),
    aten.cat.default: ([X, Y], 1),
    aten.stack.default: ([X, Y], 1),
    aten.where.self: (X > 0, X, Y),
    aten.add.Tensor: (X, Y),
    aten.sub.Tensor: (X, Y),
    aten.mul.Tensor: (X, Y),
    aten.div.Tensor: (X, Y),
    aten.mul.Scalar: (X, 2.0),
    aten.div.Scalar: (X, 2.0),
    aten.maximum.default: (X, Y),
    aten.minimum.default: (X, Y),
    aten.layer_norm.default: (X, [4], M[0], M[1]),
    aten.rms_norm.default: (X, [4], M[0]),
    aten.group_norm.default: (X, 1, M[:, 0], M[:, 1]),
    aten.instance_norm.default: (X, M[:, 0], M[:, 1], None, None, True, 0.1, 1e-5, False),
    aten.mean.dim: (X, [1]),
    aten.sum.dim_IntList: (X, [1]),
    aten.amax.default: (X, [1]),
    aten.amin.default: (X, [1]),
    aten.cumsum.default: (X, 1),
    aten.max_pool2d.default: (IMAGE, [2, 2]),
    aten.adaptive_avg_pool2d.default: (IMAGE, [2, 2]),
    aten.avg_pool2d.default: (IMAGE, [2, 2]),
    aten.upsample_nearest2d.vec: (IMAGE, [12, 12], None),
    aten.upsample_bilinear2d.vec: (IMAGE, [12, 12], False, None),
}
HOMOGENEOUS = [line.op for line in coverage() if line.homogeneity]


def op_named(name: str):
    _, packet, overload = name.split(".")
    return getattr(getattr(aten, packet), overload)


def scaled(argument, by):
    if isinstance(argument, list):
        return [item * by for item in argument]
    return argument * by


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_homogeneity_holds_on_numbers(name):
    op = op_named(name)
    law = rule_for(op).homogeneity
    args = EXAMPLES.get(op, (X,))
    powers = {index: 2.0 ** (index + 1) for index in law.degrees if index < len(args)}
    total = torch.tensor(1.0, dtype=torch.float64)
    for index, power in powers.items():
        total = total * power ** law.degrees[index]
    free = 4.0 if law.follows and not law.degrees else float(total)
    changed = list(args)
    for index, power in powers.items():
        changed[index] = scaled(args[index], power)
    for index in law.follows:
        if index < len(args) and args[index] is not None:
            changed[index] = scaled(args[index], free)
    got, want = op(*changed), op(*args)
    pairs = zip(got, want, strict=True) if isinstance(got, (tuple, list)) else [(got, want)]
    tolerance = 1e-12 if law.exact else 5e-3
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected * free, rtol=tolerance, atol=tolerance)


class OneOp(nn.Module):
    def __init__(self, op, rest):
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, x):
        return self.op(x, *self.rest)


MOVES = [
    (aten.permute.default, ([2, 0, 1],), (2, 0, 1)),
    (aten.transpose.int, (0, -1), (2, 1, 0)),
    (aten.unsqueeze.default, (1,), (0, None, 1, 2)),
    (aten.unsqueeze.default, (-1,), (0, 1, 2, None)),
    (aten.view.default, ([6, 4],), (None, 2)),
    (aten.view.default, ([2, 3, 2, 2],), (0, 1, None, None)),
    (aten.expand.default, ([5, 2, 3, 4],), (None, 0, 1, 2)),
    (aten.relu.default, (), (0, 1, 2)),
    (aten.linear.default, (torch.ones(5, 4),), (0, 1, None)),
]


@pytest.mark.parametrize(("op", "rest", "want"), MOVES, ids=[f"{m[0]}{m[2]}" for m in MOVES])
def test_axis_maps(op, rest, want):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.randn(2, 3, 4)
    node = graph.call_function(op, (x, *rest))
    node.meta["val"] = op(x.meta["val"], *rest)
    assert rule_for(op).axes(node) == want


@pytest.mark.parametrize("line", [line for line in coverage() if line.family == "movement"],
                         ids=lambda line: line.op)  # fmt: skip
def test_what_moves_keeps_every_element(line):
    rule = rule_for(op_named(line.op))
    if not rule.moves:
        return
    args = EXAMPLES[rule.op]
    assert set(rule.op(*args).flatten().tolist()) == set(args[0].flatten().tolist())


def test_match_axes_from_both_ends():
    assert match_axes((2, 3, 4), (2, 3, 4)) == (0, 1, 2)
    assert match_axes((2, 3, 4), (24,)) == (None,)
    assert match_axes((2, 12), (2, 3, 4)) == (0, None, None)
    assert match_axes((5, 2, 12), (10, 12)) == (None, 2)


def test_contractions_name_their_operands():
    linear = rule_for(aten.linear.default).contraction
    assert [(o.argument, o.role, o.axes) for o in linear.operands] == [
        (0, "activation", (-1,)), (1, "weight", (-1,)), (2, "bias", ())]  # fmt: skip
    conv = rule_for(aten.conv2d.default).contraction
    assert conv.operand("weight").axes == (-3, -2, -1)
    assert rule_for(aten.relu.default).contraction is None


def test_duplicate_registration_is_refused():
    with pytest.raises(ConfigError, match=r"aten\.relu\.default already has a rule"):
        register(Rule(op=aten.relu.default, family="elementwise"))


def test_missing_rules_are_visible():
    assert rule_for(aten.erfinv.default) is None
    lines = coverage([aten.erfinv.default, aten.erfinv.default, aten.relu.default])
    by_op = {line.op: line for line in lines}
    gap = by_op["aten.erfinv.default"]
    assert gap.family is None and gap.count == 2 and not gap.homogeneity
    assert by_op["aten.relu.default"].count == 1


def test_contraction_of_ignores_other_nodes():
    program = capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    kinds = [c.kind for n in program.module.graph.nodes if (c := contraction_of(n))]
    assert kinds == ["linear"]
