"""Quantization difficulty against its formula, and before and after transforms."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch

import scaleprop
from scaleprop.analysis.difficulty import difficulty
from scaleprop.calibration import TensorStatistics
from scaleprop.errors import CalibrationError
from scaleprop.passes.base import Pass, PassManager, PassResult, Program
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from tests.analysis.planted import WIDTH, Model, batches


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Rotate what the head reads, and the head: the function stays. Runs before it."""

    name: ClassVar[str] = "rotate-head"
    preserves_function: ClassVar[bool] = True

    def run(self, program: Program) -> PassResult:
        result = program.fork()
        graph = result.module.graph
        head = [node for node in graph.nodes if node.target is torch.ops.aten.linear.default][-1]
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < WIDTH:  # Sylvester's; 1/√64 is exact
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
        matrix /= WIDTH**0.5
        result.module.register_buffer("rotation", matrix)
        with graph.inserting_before(head):
            rotation = graph.get_attr("rotation")
            rotation.meta["val"] = matrix
            turned = []
            for operand in head.args[:2]:
                node = graph.call_function(torch.ops.aten.matmul.default, (operand, rotation))
                node.meta["val"] = operand.meta["val"]
                turned.append(node)
        head.args = (*turned, *head.args[2:])
        return PassResult(result, True)


def test_of_tables_is_the_standard_deviation_of_channel_norms():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64) * torch.arange(1, 8)
    halves = [TensorStatistics.of(half, channels=True) for half in x.split(17)]
    seen = halves[0].merge(halves[1]).merge(halves[2])
    turned = TensorStatistics.of(torch.full((3, 7), 2.0), channels=True)
    (one,) = difficulty({"x": seen}, {"x": turned})
    magnitudes = torch.linalg.vector_norm(x, dim=0)
    assert one.before == pytest.approx(float(magnitudes.std()), rel=1e-6)
    assert one.relative_before == pytest.approx(float(magnitudes.std() / magnitudes.mean()), 1e-6)
    assert (one.after, one.relative_after) == (pytest.approx(0, abs=1e-12),) * 2
    with pytest.raises(CalibrationError, match="no activation has figures per channel"):
        difficulty({"x": TensorStatistics.of(x)})


def test_a_rotation_makes_a_planted_channel_easy():
    """Programs are matched by what reads the activation, though another value is read now."""
    model = Model()
    model.table.weight[:, 17] *= 50
    measure = Calibrate(data=batches(), everything=True, channels=True)
    program = capture(model, (batches()[0],), {})
    before = measure.run(PassManager([Canonicalise()]).run(program)).program
    after = measure.run(PassManager([Rotate()], verify=True).run(before)).program
    found = difficulty(before, after)
    assert len(found) == 13
    *others, head = found
    assert all(one.after == pytest.approx(one.before, rel=1e-5) for one in others)
    # one channel of 64 has most of the norm; turned, all share it
    assert head.relative_before > 1.5 and head.relative_after is not None
    assert head.relative_after < head.relative_before / 3
    assert head.after is not None and head.after < head.before / 2

    report = scaleprop.analyze(model, batches()[0], iter(batches()), passes=[Rotate()])
    assert report.outliers is not None
    shown = {profile.reader: profile for profile in report.outliers.profiles}
    assert shown[head.name].after == pytest.approx(head.after, rel=1e-5)
    assert shown[head.name].relative_difficulty == pytest.approx(head.relative_before, rel=1e-5)
