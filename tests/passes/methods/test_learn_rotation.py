"""Learned rotations: the update against the paper's formulas, orthogonality, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.formats import fake_quantize, parse
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.methods import learn_rotation
from scaleprop.passes.methods.fold_norms import FoldNorms
from scaleprop.passes.methods.learn_rotation import LearnRotation
from scaleprop.passes.pipeline import parse_pass
from scaleprop.passes.transforms.learning import QuantizedOutput, straight_through
from scaleprop.passes.transforms.region import find_region
from scaleprop.passes.transforms.transform import hadamard_rotation

from .small import calibrated, change_in_float64, error, gated, tokens, work

INT4 = "int4[row]*f32"


def linear(size: int = 16, count: int = 96) -> tuple[nn.Module, list[torch.Tensor]]:
    """Correlated channels of unlike sizes, one far larger."""
    torch.manual_seed(0)
    mix = torch.randn(size, size) * torch.linspace(-1.5, 1.5, size).exp()
    rows = torch.randn(count, size) @ mix
    rows[:, 2] *= 15
    return nn.Linear(size, 12).eval(), [rows]


def test_the_loss_is_the_outputs_error() -> None:
    model, inputs = linear()
    found = work(model, inputs, "int4-int4", LearnRotation())
    loss = QuantizedOutput(found, found.sites()[0])
    assert (len(loss.learnt), len(loss.held)) == (72, 24)
    role = found.assignment(found.sites()[0].readers[0])
    assert role is not None and role.activation is not None and role.weight is not None
    formats = role.activation.format, role.weight.format
    q = hadamard_rotation(16, torch.Generator().manual_seed(3)).matrix.float()
    got = loss(loss.held, lambda x: x @ q, lambda w: w @ q)
    weight = model.get_parameter("weight").detach()
    want = loss.held @ weight.T
    made = fake_quantize(loss.held @ q, formats[0]) @ fake_quantize(weight @ q, formats[1]).T
    torch.testing.assert_close(got, (made - want).square().sum() / want.square().sum())


def test_two_steps_are_cayley_sgd() -> None:
    """Algorithm 1 of arXiv:2002.01113, with the inverse in place of its iteration."""
    model, inputs = linear(8)
    method = LearnRotation(steps=2, rate=0.3, momentum=0.7, rows=10_000)
    at = work(model, inputs, "int4-int4", method)
    site = at.sites()[0]
    region = find_region(site.value, "rotate", only_users=site.readers)
    part = learn_rotation._Part(at, region, site)  # pyright: ignore[reportPrivateUsage]
    rows = part.output.learnt
    x0 = hadamard_rotation(8, torch.Generator().manual_seed(1)).matrix
    got = list(method._descend(x0, [part], torch.Generator().manual_seed(0)))  # pyright: ignore[reportPrivateUsage]

    x, m, eye = x0, torch.zeros(8, 8).double(), torch.eye(8).double()
    for step, rate in enumerate((0.3, 0.15)):
        leaf = x.float().requires_grad_()
        part(rows, leaf).backward()
        assert leaf.grad is not None
        m = 0.7 * m - leaf.grad.double()
        hat = m @ x.T - x @ (x.T @ m @ x.T) / 2
        w = hat - hat.T
        m = w @ x
        w = w * rate * 8**0.5 / w.square().sum().sqrt()
        x = torch.inverse(eye - w / 2) @ (eye + w / 2) @ x
        # rows come in another order: float32 sums of the gradient differ a little
        torch.testing.assert_close(got[step], x, rtol=0, atol=2e-4)
    assert (got[0] - x0).norm() / 8**0.5 == pytest.approx(0.3, rel=0.1)  # so far turns a channel


def test_matrices_stay_orthogonal() -> None:
    model, inputs = linear()
    method = LearnRotation(steps=60, rate=0.3)
    at = work(model, inputs, "int4-int4", method)
    site = at.sites()[0]
    region = find_region(site.value, "rotate", only_users=site.readers)
    learned = method.rotation(at, region, [site], torch.Generator().manual_seed(0))
    start = hadamard_rotation(16, torch.Generator().manual_seed(0))
    assert float((learned.matrix @ learned.matrix.T - torch.eye(16)).abs().max()) < 1e-12
    assert float((learned.matrix - start.matrix).norm()) > 0.1


def test_the_function_stays() -> None:
    for rms in (True, False):
        model, inputs = gated(rms), tokens()
        method = LearnRotation(steps=5)
        program = calibrated(model, inputs, "int4-int4", method)
        again = Calibrate(data=inputs, everything=True, channels=True, sample=method.needs.sample)
        folded = again.run(FoldNorms().run(program).program).program
        assert change_in_float64(folded, method) < 1e-10


def test_it_is_better_than_where_it_began() -> None:
    model, inputs = linear(32, 512)
    start = error(model, inputs, "int4-int4", "rotate")
    assert error(model, inputs, "int4-int4", "learn-rotation") < 0.8 * start
    model, inputs = gated(False), tokens()
    start = error(model, inputs, "int4-int4", "fold-norms", "rotate")
    assert error(model, inputs, "int4-int4", "fold-norms", "learn-rotation") < start


def test_gradients_reach_scales() -> None:
    """By differences of amax: the largest of a row grows, and all of the row's errors with it."""
    x = torch.tensor([[0.3, -7.0, 2.6, 0.9]], requires_grad=True)
    made = straight_through(x, parse(INT4))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (gradient,) = torch.autograd.grad((made * weights).sum(), x)
    noise = (fake_quantize(x.detach(), INT4) - x.detach())[0]
    want = weights.clone()
    want[1] += float((noise * weights).sum()) / -7.0
    torch.testing.assert_close(made.detach(), fake_quantize(x.detach(), INT4))
    torch.testing.assert_close(gradient[0], want)


def test_bad_options_and_too_few_rows() -> None:
    for bad in ("steps=0", "rows=0", "rate=0.0", "momentum=1.0", "cuts=-1"):
        with pytest.raises(ConfigError, match=bad.partition("=")[0]):
            parse_pass(f"learn-rotation{{{bad}}}")
    model, (rows,) = linear()
    with pytest.raises(CalibrationError, match="3 rows"):
        found = work(model, [rows[:3]], "int4-int4", LearnRotation())
        QuantizedOutput(found, found.sites()[0])
