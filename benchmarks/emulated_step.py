"""What emulating a low-precision training step costs on this machine.

    python -m benchmarks.emulated_step [--width 256] [--layers 4] [--threads 2] [--quick]

Forward and backward of the language model of ``examples/train_lm`` under bfloat16 autocast:
``torch.compile`` as it is (the BF16 step); recipes ``mxfp8`` and ``nvfp4``; and the same emulation
in eager operators, as simulators write it (``eager_linear``). Steps are interleaved. Exits with 1
where a recipe takes more than ``LIMITS`` times the BF16 step, or eager less than ``FASTER`` times
the recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import scaleprop
from benchmarks import harness
from examples import language_model

LIMITS = {"mxfp8": 3.0, "nvfp4": 4.0}
FASTER = 5.0
Quantize = Callable[[torch.Tensor, int], torch.Tensor]


def round_elements(x: torch.Tensor, mantissa: int, smallest: int, most: float) -> torch.Tensor:
    """Elementwise rounding as Rouhani et al. (arXiv:2310.10537, microxcaling) compute it: scaled to
    integers by the private exponent, half away from zero, clamped."""
    exponent = torch.floor(torch.log2(x.abs() + (x == 0).type(x.dtype))).clip(min=smallest)
    scaled = x / (2.0**exponent) * (2.0**mantissa)
    scaled = torch.sign(scaled) * torch.floor(torch.abs(scaled) + 0.5)
    return (scaled / (2.0**mantissa) * (2.0**exponent)).clamp(-most, most)


def eager_mxfp8(x: torch.Tensor, axis: int) -> torch.Tensor:
    """MXFP8, E4M3: blocks of 32, shared exponents rounded down."""
    blocks, restore = _blocks(x, axis, 32)
    amax = blocks.abs().amax(-1, keepdim=True)
    shared = torch.floor(torch.log2(amax + (amax == 0).type(amax.dtype) * 2.0**-126)) - 8
    shared = shared.clamp(-127, 127)
    return restore(round_elements(blocks / (2.0**shared), 3, -6, 448.0) * (2.0**shared))


def eager_nvfp4(x: torch.Tensor, axis: int) -> torch.Tensor:
    """NVFP4: blocks of 16 with E4M3 scales under one of the tensor."""
    blocks, restore = _blocks(x, axis, 16)
    outer = x.abs().amax() / (448.0 * 6.0)
    scale = round_elements(blocks.abs().amax(-1, keepdim=True) / 6.0 / outer, 3, -6, 448.0)
    scale = torch.where(scale == 0, 1.0, scale) * outer
    return restore(round_elements(blocks / scale, 1, 0, 6.0) * scale)


def _blocks(x: torch.Tensor, axis: int, size: int) -> tuple[torch.Tensor, Any]:
    moved = x.float().movedim(axis, -1)
    padded = nn.functional.pad(moved, (0, -moved.shape[-1] % size))

    def restore(blocks: torch.Tensor) -> torch.Tensor:
        flat = blocks.reshape(padded.shape)[..., :moved.shape[-1]]
        return flat.movedim(-1, axis).to(torch.bfloat16)

    return padded.reshape(*padded.shape[:-1], -1, size), restore


def eager_linear(quantize: Quantize) -> Any:
    """A linear layer whose three products read operands quantized along what they sum over."""

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, w)
            return quantize(x, -1) @ quantize(w, -1).t()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> Any:
            x, w = ctx.saved_tensors
            rows, tokens = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
            dx = quantize(dy, -1) @ quantize(w, 0)
            dw = quantize(rows, 0).t() @ quantize(tokens, 0)
            return dx.to(x.dtype), dw.to(w.dtype)

    return Linear.apply


def in_eager(model: nn.Module, quantize: Quantize) -> nn.Module:
    """``model`` with every linear layer but the last emulated in eager operators."""
    linear = eager_linear(quantize)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers[:-1]:
        layer.forward = lambda x, layer=layer: linear(x, layer.weight)  # type: ignore[method-assign]
    return model


def stepper(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of one batch under autocast."""

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids)
        loss.backward()

    step()
    return step


def measure(settings: language_model.Settings, plan: harness.Plan) -> dict[str, harness.Timing]:
    """Steps of all candidates, in turns."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return language_model.Language(settings)

    ids = torch.randint(settings.vocabulary, (settings.batch, settings.context + 1))
    models: dict[str, nn.Module] = {
        "bf16": torch.compile(model()),  # type: ignore[dict-item]
        **{name: scaleprop.prepare_training(model(), name) for name in LIMITS},
        "mxfp8, eager": in_eager(model(), eager_mxfp8),
        "nvfp4, eager": in_eager(model(), eager_nvfp4)}
    return harness.measure({name: stepper(each, ids) for name, each in models.items()}, plan)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = dataclasses.replace(language_model.Settings(), width=options.width,
                                   layers=options.layers)
    plan = harness.QUICK if options.quick else harness.Plan(rounds=15, min_seconds=0.2)
    timings = measure(settings, plan)
    good, rows = True, []
    for name, limit in LIMITS.items():
        cost = harness.speedup(timings["bf16"], timings[name], "wall")
        gain = harness.speedup(timings[name], timings[f"{name}, eager"], "wall")
        good &= cost.median <= limit and gain.median >= FASTER
        rows.append([name, f"{timings[name].median_ms('wall'):.0f}", cost, limit, gain, FASTER])
    header = ["recipe", "step, ms", "÷ BF16 step", "at most", "eager ÷ it", "at least"]
    info = harness.machine()
    text = "\n".join(["# What emulating a training step costs", "",
                      f"Machine: {harness.machine_line(info)}", "",
                      f"BF16 step: {timings['bf16'].median_ms('wall'):.0f} ms", "",
                      harness.markdown_table(header, rows)])
    results = harness.Results("emulated_step" + "_quick" * options.quick, options.results)
    results.add("steps", {name: timing.to_dict() for name, timing in timings.items()})
    results.write_markdown(text)
    print(text)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
