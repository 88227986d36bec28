"""What optimizer state in 16 or 8 bits costs: time of a step, bytes, distance from float32's path.

    python -m benchmarks.optimizer_state [--threads 1] [--quick]

AdamW on the parameters of a 4M-parameter Llama, on a CPU. Steps are interleaved with those of
``AdamW(foreach=True)`` with float32 state (see ``harness``). The distance: after 50 steps on the
same gradients, which are noise about a mean, ‖w - w₃₂‖ / ‖w₃₂ - w₀‖.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from scaleprop.optim import scaled_state

LIMIT = 2.0  # a step with float16 state ÷ one of foreach AdamW
STEPS = 50
KINDS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": "fp16"},
    "bf16": {"dtype": "bf16"},
    "fp8": {"dtype": "fp8"},
    "fp8, squares too": {"dtype": "fp8", "second": "fp8"},
}
Optimizer = torch.optim.Optimizer


def shapes(
    width: int = 256, inner: int = 704, layers: int = 4, words: int = 4096
) -> list[tuple[int, ...]]:
    """Of a Llama with tied embeddings: 4.26M values in 38 tensors."""
    layer = [(width,), *[(width, width)] * 4, (width,), (inner, width), (inner, width),
             (width, inner)]
    return [(words, width), *layer * layers, (width,)]


def optimizer(kind: str | None, foreach: bool | None = None) -> Optimizer:
    """AdamW on new parameters with gradients; its state is kept as ``kind`` says."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
              for shape in shapes()]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    made = torch.optim.AdamW(params, foreach=foreach)
    if kind is not None:
        options = dict(KINDS[kind])
        if "second" in options:
            options["generator"] = torch.Generator().manual_seed(0)
        scaled_state(made, **options)
    return made


def params_of(made: Optimizer) -> list[torch.Tensor]:
    """All parameters."""
    return [param for group in made.param_groups for param in group["params"]]


def state_bytes(made: Optimizer) -> int:
    """Of all tensors of the state."""
    return sum(value.nbytes for entry in made.state.values() for value in entry.values()
               if isinstance(value, torch.Tensor))


def path(kind: str | None, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Parameters before and after some steps on the gradients of a fixed seed."""
    made = optimizer(kind)
    generator = torch.Generator().manual_seed(1)
    params = params_of(made)
    means = [torch.randn(param.shape, generator=generator) * 1e-3 for param in params]
    start = torch.cat([param.detach().reshape(-1) for param in params])
    for _ in range(steps):
        for param, mean in zip(params, means, strict=True):
            param.grad = mean + 1e-3 * torch.randn(param.shape, generator=generator)
        made.step()
    return start, torch.cat([param.detach().reshape(-1) for param in params])


def distances(steps: int) -> dict[str, float]:
    """How far from float32's path each kind ends, relative to the path's length."""
    start, exact = path(None, steps)
    return {kind: ((path(kind, steps)[1] - exact).norm() / (exact - start).norm()).item()
            for kind in KINDS}


def measure(plan: harness.Plan, steps: int) -> dict[str, Any]:
    """Timings by candidate, bytes and distances."""
    made = {"foreach": optimizer(None, foreach=True), "float32": optimizer(None),
            **{kind: optimizer(kind) for kind in KINDS}}
    steppers: dict[str, Callable[[], object]] = {name: one.step for name, one in made.items()}
    timings = harness.measure(steppers, plan)
    return {"steps": {name: timing.to_dict() for name, timing in timings.items()},
            "bytes": {name: state_bytes(one) for name, one in made.items()},
            "distance": distances(steps)}


def ratio(row: dict[str, Any], name: str) -> harness.Ratio:
    """A step's time ÷ foreach AdamW's."""
    timings = {key: harness.Timing.from_dict(found) for key, found in row["steps"].items()}
    return harness.speedup(timings["foreach"], timings[name], "cpu")


def table(results: harness.Results) -> str:
    """Markdown."""
    body: list[list[object]] = []
    for threads, row in results.sections.items():
        for name in row["steps"]:
            timing = harness.Timing.from_dict(row["steps"][name])
            distance = row["distance"].get(name)
            body.append([
                threads, name, f"{timing.median_ms('cpu'):.1f}", ratio(row, name),
                f"{row['bytes'][name] / 1e6:.1f}",
                f"{row['bytes']['foreach'] / row['bytes'][name]:.2f}",
                None if distance is None else f"{distance:.2%}"])
    header = ["threads", "state", "step, ms of CPU", "÷ foreach's", "state, MB", "times smaller",
              "distance"]
    return "\n".join([
        "# What optimizer state in 16 or 8 bits costs", "",
        f"Machine: {harness.machine_line(results.data['machine'])}", "",
        "AdamW, 4.26M parameters of a Llama; `foreach` and `float32` (torch's own choice on a CPU, "
        "one tensor after another) keep float32 state. Distance: from float32's parameters after "
        f"{STEPS} steps, relative to how far those moved.", "",
        harness.markdown_table(header, body)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="three rounds, ten steps")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    name = "optimizer_state_quick" if options.quick else "optimizer_state"
    results = harness.Results(name, options.results)
    plan = harness.QUICK if options.quick else harness.Plan(rounds=21, min_seconds=0.05)
    results.add(str(options.threads), measure(plan, 10 if options.quick else STEPS))
    text = table(results)
    results.write_markdown(text)
    print(text)
    return 0 if ratio(results.sections[str(options.threads)], "fp16").median <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
