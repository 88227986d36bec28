"""Small architectures with planted outliers, and what tests of methods do with them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.base import Program, widened
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.pipeline import build
from scaleprop.passes.transforms.base import TransformPass, Work
from scaleprop.recipes import Recipe, named_recipe

WIDE = 32


class Gated(nn.Module):
    """Pre-norm attention with shared heads and a gated MLP, under unusual names; RMS or layer
    norms."""

    def __init__(self, rms: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if rms else nn.LayerNorm
        self.quiet, self.calm = norm(WIDE), norm(WIDE)
        self.ask, self.tell = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, WIDE // 2)
        self.know = nn.Linear(WIDE, WIDE // 2)
        self.join = nn.Linear(WIDE, WIDE)
        self.gate, self.up = nn.Linear(WIDE, 48), nn.Linear(WIDE, 48, bias=False)
        self.down = nn.Linear(48, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        y = self.quiet(x)
        q = self.ask(y).view(batch, length, 4, 8).transpose(1, 2)
        k, v = (part(y).view(batch, length, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
                for part in (self.know, self.tell))  # fmt: skip
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.join(y.transpose(1, 2).reshape(batch, length, WIDE))
        y = self.calm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Images(nn.Module):
    """Convolutions, batch norm, relu, depthwise, pooling, a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.last = nn.Conv2d(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(x)))
        x = F.relu(self.point(F.relu(self.depth(x))))
        return self.last(x.mean((2, 3)))


def gated(rms: bool = True, *, seed: int = 0) -> nn.Module:
    """One channel of each norm's output is 40 times as large as others, one lies far from 0."""
    torch.manual_seed(seed)
    model = Gated(rms).eval()
    with torch.no_grad():
        for norm in (model.quiet, model.calm):
            norm.weight.uniform_(0.5, 1.5)
            norm.weight[3] = 40.0
            if not rms:
                norm.bias.uniform_(-1, 1)
                norm.bias[7] = 30.0
        for reader in (model.ask, model.know, model.tell, model.gate, model.up):
            reader.weight[:, 3] *= 0.05  # what training gives such a channel
    return model


def images(*, seed: int = 0) -> nn.Module:
    """Ranges of channels differ by a factor of 100."""
    torch.manual_seed(seed)
    model = Images().eval()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-0.5, 0.5)
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.weight.copy_(torch.logspace(-1, 1, 8))
        model.bn.bias.uniform_(-0.1, 0.1)
        model.point.weight.mul_(torch.logspace(-1, 1, 12)[:, None, None, None])
    return model


def tokens(count: int = 4, *, seed: int = 1) -> list[Tensor]:
    """Batches for ``gated``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 12, WIDE, generator=generator) for _ in range(count)]


def pictures(count: int = 4, *, seed: int = 1) -> list[Tensor]:
    """Batches for ``images``."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 6, 6, generator=generator) for _ in range(count)]


@functools.lru_cache(maxsize=8)
def _captured(model: nn.Module, shape: torch.Size) -> Program:
    """Tensors are shared with the model."""
    return capture(model, (torch.zeros(shape),), {})


def assigned(model: nn.Module, inputs: list[Tensor], recipe: str | Recipe) -> Program:
    """Captured, canonical, with formats."""
    program = _captured(model, inputs[0].shape).replace(example_args=(inputs[0],))
    recipe = named_recipe(recipe) if isinstance(recipe, str) else recipe
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=recipe)):
        program = step.run(program).program
    return program


def calibrated(
    model: nn.Module, inputs: list[Tensor], recipe: str | Recipe, method: TransformPass
) -> Program:
    """With what ``method`` reads of calibration."""
    program, needs = assigned(model, inputs, recipe), method.needs
    step = Calibrate(data=inputs, everything=True, channels=needs.channels, sample=needs.sample)
    return step.run(program).program


def work(
    model: nn.Module, inputs: list[Tensor], recipe: str | Recipe, method: TransformPass
) -> Work:
    """What ``method`` is given."""
    return Work(calibrated(model, inputs, recipe, method), method)


def change_in_float64(program: Program, method: TransformPass) -> float:
    """How far ``method`` moves the function, relative to its largest value, in float64."""
    wide = widened(program)
    with torch.no_grad():
        want = wide.module(*wide.example_args)
        got = method.run(wide).program.module(*wide.example_args)
    return float((got - want).abs().max() / want.abs().max())


def error(
    model: nn.Module, inputs: list[Tensor], recipe: str | Recipe, *passes: str
) -> float:
    """Relative squared error of the quantized model, over all inputs."""
    recipe = named_recipe(recipe) if isinstance(recipe, str) else recipe
    program = _captured(model, inputs[0].shape).replace(example_args=(inputs[0],))
    found = build(recipe, calibration=inputs, extra=passes).run(program).module
    noise = signal = 0.0
    with torch.no_grad():
        for x in inputs:
            want = model(x).double()
            noise += float((found(x).double() - want).square().sum())
            signal += float(want.square().sum())
    return noise / signal


def prepared(model: nn.Module, x: Tensor, recipe: str | Recipe) -> Program:
    """Assigned and calibrated on ``x``."""
    program = capture(model, (x,), {})
    for step in (CleanUp(), Canonicalise(), AssignFormats(recipe=named_recipe(recipe)),
                 Calibrate(data=[x], everything=True, channels=True, sample=256)):
        program = step.run(program).program
    return program


def parameter(program: Program, ending: str) -> Tensor:
    """The first whose name ends so."""
    found = dict(program.module.named_buffers()) | dict(program.module.named_parameters())
    return next(value for name, value in found.items() if name.endswith(ending)).detach()
