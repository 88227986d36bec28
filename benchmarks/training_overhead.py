"""What the backend costs in full precision: training steps and compile time, against Inductor's.

    python -m benchmarks.training_overhead [--models llama,bert,vit] [--threads 2] [--quick]

Three candidates per model: ``backend="inductor"``; ``backend="scaleprop"`` with recipe ``fp32``,
which changes nothing; and exact mode: the exponents that recipe ``fp8`` chooses, without its casts.
A step is forward and backward, no optimizer. Steps are interleaved (see ``harness``). Compilations
start with empty caches and are timed to the end of their first step, in turns; the first round, in
which the process itself warms up, is thrown away.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch._inductor.utils import fresh_cache

from benchmarks import harness
from benchmarks.exact import Exact

LIMITS = {"fp32": (1.05, 2.0), "exact": (1.15, 2.0)}  # step, compile time: ÷ Inductor's
Step = Callable[[], torch.Tensor]


class Loss(torch.nn.Module):
    """The loss alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).loss


def _llama() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 2048, (8, 128))
    return hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False)), {
            "input_ids": ids, "labels": ids}


def _bert() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 2048, (8, 128))
    return hf.BertForMaskedLM(hf.BertConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)), {
            "input_ids": ids, "labels": ids}


def _vit() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return hf.ViTForImageClassification(hf.ViTConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024,
        image_size=64, patch_size=8, num_labels=10)), {
            "pixel_values": torch.randn(16, 3, 64, 64), "labels": torch.randint(0, 10, (16,))}


MODELS = {"llama": _llama, "bert": _bert, "vit": _vit}


def stepper(model: torch.nn.Module, inputs: dict[str, torch.Tensor], name: str) -> Step:
    """A training step of ``model`` under the candidate ``name``; compiled when first called."""
    backends: dict[str, dict[str, Any]] = {
        "inductor": {"backend": "inductor"}, "exact": {"backend": Exact()},
        "fp32": {"backend": "scaleprop", "options": {"recipe": "fp32"}}}
    compiled = torch.compile(model, fullgraph=True, **backends[name])

    def step() -> torch.Tensor:
        model.zero_grad()
        loss = compiled(**inputs)
        loss.backward()
        return loss.detach()

    return step


def compiled_cold(step: Step) -> tuple[float, torch.Tensor]:
    """Seconds of a first step with empty caches, and its loss."""
    torch._dynamo.reset()
    with fresh_cache():
        started = time.perf_counter()
        loss = step()
        return time.perf_counter() - started, loss


def measure(name: str, plan: harness.Plan, compilations: int) -> dict[str, Any]:
    """One model.

    Raises:
        ValueError: where a candidate's loss or gradients are others.
    """
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = Loss(model.train())
    candidates = ["inductor", *LIMITS]
    seconds: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    steps: dict[str, Step] = {}
    exact: list[torch.Tensor] = []
    for turn in range(1 + compilations):
        for candidate in candidates[turn % 3:] + candidates[:turn % 3]:
            steps[candidate] = stepper(model, inputs, candidate)
            taken, loss = compiled_cold(steps[candidate])
            seconds[candidate].extend([taken] if turn else [])
            found = [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            check(f"{name}, {candidate}", found, exact := exact or found)
    timings = harness.measure(steps, plan)
    return {"compile": seconds, "steps": {key: time.to_dict() for key, time in timings.items()}}


def check(name: str, found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> None:
    """Loss and gradients are the same but for float32's rounding.

    Raises:
        ValueError: where they are not.
    """
    for place, (a, b) in enumerate(zip(found, exact, strict=True)):
        off = float((a - b).norm() / b.norm().clamp(min=1e-30))
        if not off <= 1e-4:
            what = f"gradient {place - 1}" if place else "the loss"
            raise ValueError(f"{name}: {what} is off by {off:.1e}")


def ratios(row: dict[str, Any], candidate: str) -> tuple[harness.Ratio, float]:
    """Step and compile time ÷ Inductor's: median of rounds with quartiles; of medians."""
    timings = {key: harness.Timing.from_dict(found) for key, found in row["steps"].items()}
    step = harness.speedup(timings["inductor"], timings[candidate], "wall")
    mine, other = (statistics.median(row["compile"][key]) for key in (candidate, "inductor"))
    return step, mine / other


def table(results: harness.Results) -> str:
    """Markdown."""
    body: list[list[object]] = []
    for name, row in results.sections.items():
        for candidate, (most, longest) in LIMITS.items():
            step, compiling = ratios(row, candidate)
            milliseconds = harness.Timing.from_dict(row["steps"][candidate]).median_ms("wall")
            body.append([name, candidate, f"{milliseconds:.1f}", step, f"{most:.2f}",
                         f"{statistics.median(row['compile'][candidate]):.1f}",
                         f"{compiling:.2f}", f"{longest:.1f}",
                         "yes" if step.median <= most and compiling <= longest else "NO"])
    header = ["model", "candidate", "step, ms", "step ÷ Inductor's", "at most", "compile, s",
              "compile ÷ Inductor's", "at most", "within"]
    return "\n".join(["# What the training backend costs in full precision", "",
                      f"Machine: {harness.machine_line(results.data['machine'])}", "",
                      harness.markdown_table(header, body)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one compilation, three rounds")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.compile(torch.nn.Linear(3, 3))(torch.randn(2, 3)).sum().backward()  # starts the workers
    results = harness.Results("training_overhead" + "_quick" * options.quick, options.results)
    plan = harness.QUICK if options.quick else harness.Plan(rounds=21, min_seconds=0.2)
    for name in options.models.split(","):
        results.add(name, measure(name, plan, 1 if options.quick else 3))
        results.write_markdown(table(results))
    print(table(results))
    good = all(step.median <= LIMITS[candidate][0] and compiling <= LIMITS[candidate][1]
               for row in results.sections.values() for candidate in LIMITS
               for step, compiling in [ratios(row, candidate)])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
