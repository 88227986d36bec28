"""Cross-layer equalisation, folded batch norms and corrected biases of convolutional networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaleprop.errors import ConfigError
from scaleprop.formats import fake_quantize
from scaleprop.passes.methods.correct_bias import CorrectBias
from scaleprop.passes.methods.equalise import Equalise
from scaleprop.passes.methods.fold_batch_norms import FoldBatchNorms
from scaleprop.recipes import Recipe, Role

from .small import assigned, calibrated, change_in_float64, error, gated, images, pictures, tokens

TENSOR = Recipe(name="tensor", description="", roles={
    "fprop.w": Role(format="int8[tensor]*f32"), "conv.w": Role(format="int8[tensor]*f32")})
ROWS = "int4[row]*f32"
FOUR = Recipe(name="four", description="", roles={
    "fprop.w": Role(format=ROWS), "conv.w": Role(format=ROWS)})  # fmt: skip


def parameters(program):
    return dict(program.module.named_buffers()) | dict(program.module.named_parameters())


def test_ranges_of_both_sides_become_equal():
    """relu between a convolution and a depthwise one, then a linear behind a mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, (1, 2), groups=2)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.tensor([0.01, 1.0, 5.0, 40.0])[:, None, None, None])
    x = torch.randn(2, 3, 6, 6)
    program = assigned(model, [x], TENSOR)
    found = parameters(Equalise().run(program).program)
    first, second = model[0].weight.detach(), model[2].weight.detach()
    for j in range(4):
        group = slice(0, 3) if j < 2 else slice(3, 6)
        r1 = float(first[j].abs().max())
        r2 = float(second[group, j % 2].abs().max())
        s = (r1 / r2) ** 0.5
        torch.testing.assert_close(found["0.weight"][j], first[j] / s)
        torch.testing.assert_close(found["0.bias"][j], model[0].bias[j].detach() / s)
        torch.testing.assert_close(found["2.weight"][group, j % 2], second[group, j % 2] * s)


class Branches(nn.Module):
    """A residual stream between convolutions: all that make and read it share one scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.one = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.two, self.out = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        with torch.no_grad():
            self.stem.weight.mul_(torch.logspace(-2, 1, 6)[:, None, None, None])

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        return self.out(F.max_pool2d(x, 2))


@pytest.mark.parametrize(("model", "inputs"), [
    (images(), pictures()), (Branches().eval(), pictures()), (gated(rms=True), tokens()),
], ids=["images", "branches", "gated"])  # fmt: skip
def test_the_function_stays(model, inputs):
    program = assigned(model, inputs, TENSOR)
    for method in (FoldBatchNorms(), Equalise()):
        assert change_in_float64(program, method) < 1e-10
        program = method.run(program).program
    assert any(record.refused is None for record in program.transforms)
    assert not any(record.runtime for record in program.transforms)


def test_a_stream_is_equalised_as_one():
    model, inputs = Branches().eval(), pictures()
    before = assigned(model, inputs, TENSOR)
    found = parameters(Equalise(rounds=30).run(before).program)
    makes = [found["stem.weight"], found["two.weight"]]
    reads = [found["one.weight"], found["out.weight"]]
    for j in range(6):
        made = max(float(w[j].abs().max()) for w in makes)
        read = max(float(w[:, j].abs().max()) for w in reads)
        assert made == pytest.approx(read, rel=0.05)


def test_rounds_settle_what_one_leaves():
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(3) for part in (nn.Linear(8, 8), nn.ReLU())])
    with torch.no_grad():
        model[2].weight.mul_(torch.logspace(-2, 2, 8)[:, None])
    x = torch.randn(4, 8)

    def gap(rounds):
        found = parameters(Equalise(rounds=rounds).run(assigned(model, [x], TENSOR)).program)
        r1, r2 = found["0.weight"].abs().amax(1), found["2.weight"].abs().amax(0)
        return float((r1 / r2).log().abs().max())

    assert gap(1) > 0.05 > gap(30)


def test_batch_norms_fold_to_the_bit_of_their_formula():
    model, inputs = images(), pictures()
    program = FoldBatchNorms().run(assigned(model, inputs, TENSOR)).program
    assert not any("batch_norm" in str(node.target) for node in program.module.graph.nodes)
    found, bn = parameters(program), model.bn
    gain = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    want = model.first.weight.double() * gain[:, None, None, None]
    torch.testing.assert_close(found["first.weight"], want.float().detach())
    bias = next(value for name, value in found.items() if "conv2d_operand2" in name)
    torch.testing.assert_close(bias, (bn.bias - bn.running_mean.double() * gain).float().detach())
    (record,) = program.transforms
    assert record.refused is None and record.runtime == ()
    assert record.absorbed[0] == "first.weight" and found[record.absorbed[1]] is bias


def test_a_bias_before_a_batch_norm_is_folded_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[1].running_mean.uniform_(1, 2)
        model[1].running_var.uniform_(2, 4)
    program = assigned(model, pictures(), TENSOR)
    assert FoldBatchNorms().run(program).modified
    assert change_in_float64(program, FoldBatchNorms()) < 1e-10


def test_batch_norms_that_cannot_be_folded_say_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(self.b(x))
            return self.a(y) + y

    found = FoldBatchNorms().run(assigned(Odd().eval(), pictures(), TENSOR))
    assert not found.modified
    reasons = [record.refused for record in found.program.transforms]
    assert reasons == ["it reads no convolution", "others read the convolution before it"]


def test_errors_fall_with_one_scale_a_tensor():
    model, inputs = images(), pictures()
    plain = error(model, inputs, TENSOR, "fold-batch-norms")
    assert error(model, inputs, TENSOR, "fold-batch-norms", "equalise") < plain / 4


def test_mean_outputs_are_those_of_the_source():
    """Of inputs with a mean, the layer's mean output is exact, one layer after the other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False)).eval()
    inputs = [torch.randn(2, 4, 5, 5) + 3 for _ in range(3)]
    method = CorrectBias()
    found = parameters(method.run(calibrated(model, inputs, FOUR, method)).program)
    weight = model[0].weight.detach()
    rounded = fake_quantize(weight.flatten(1), ROWS).reshape(weight.shape)
    x = torch.cat(inputs)
    bias = next(value for name, value in found.items() if "operand2" in name)
    want = F.conv2d(x.double(), weight.double(), groups=2).mean((0, 2, 3))
    got = F.conv2d(x.double(), rounded.double(), bias.double(), groups=2).mean((0, 2, 3))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    plain = F.conv2d(x.double(), rounded.double(), groups=2).mean((0, 2, 3))
    assert (plain - want).abs().max() > 1e-2


def test_biases_that_are_there_move():
    model, inputs = images(), [x + 1 for x in pictures()]
    plain = error(model, inputs, FOUR, "fold-batch-norms")
    assert error(model, inputs, FOUR, "fold-batch-norms", "correct-bias") < plain


def test_compensated_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    recipe = Recipe(name="c", description="", roles={
        "fprop.w": Role(format=ROWS, rounding="compensated")})  # fmt: skip
    method = CorrectBias()
    found = method.run(calibrated(model, [torch.randn(9, 8)], recipe, method))
    assert not found.modified and "rounded compensated" in found.notes[-2]


def test_refusals():
    with pytest.raises(ConfigError, match="at least 1"):
        Equalise(rounds=0)
