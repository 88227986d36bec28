"""Clean-up removes what computes nothing, and nothing else."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.passes.base import PassManager
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp


def cleaned(model, *args):
    program = PassManager([CleanUp()], verify=True).run(capture(model.eval(), args))
    found = [str(n.target) for n in program.module.graph.nodes if n.op == "call_function"]
    return program, found


def test_no_ops_go():
    class NoOps(nn.Module):
        def forward(self, x):
            x = F.dropout(x, 0.5, training=self.training).detach().to(torch.float32)
            x = x[:, :].contiguous().view(x.shape).permute(0, 1) * 1.0
            return (x / 1).clone().relu()

    assert cleaned(NoOps(), torch.randn(2, 3))[1] == ["aten.relu.default"]


def test_copies_that_change_strides_stay():
    class Turn(nn.Module):
        def forward(self, x):
            return x.t().contiguous().view(-1)

    program, found = cleaned(Turn(), torch.randn(2, 3))
    assert "aten.clone.default" in found
    x = torch.randn(4, 3)
    assert torch.equal(program.module(x), x.t().reshape(-1))


def test_adding_zero_stays_for_floats():
    class Zero(nn.Module):
        def forward(self, x):
            return x + 0.0

    program, found = cleaned(Zero(), torch.randn(2, 3))
    assert found == ["aten.add.Tensor"]
    assert not torch.signbit(program.module(torch.full((2, 3), -0.0))).any()


def test_equal_nodes_are_merged_and_random_ones_are_not():
    class Twice(nn.Module):
        def forward(self, x):
            noise = torch.rand_like(x) + torch.rand_like(x)
            return x.exp() + x.exp(), x * 1, x * True, noise

    found = cleaned(Twice(), torch.randn(2, 3))[1]
    assert found.count("aten.exp.default") == 1
    assert sum("rand" in op for op in found) == 2


def test_the_given_program_is_left_alone(tied, ids):
    program = capture(tied, (ids,))
    before = str(program.module.graph)
    CleanUp().run(program)
    assert str(program.module.graph) == before
