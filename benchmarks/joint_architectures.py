"""Do scales pass through forward and backward of every architecture without changing anything?

    python -m benchmarks.joint_architectures [--only llama,t5] [--inner eager,inductor] [--jobs 2]

Each model's joint graph is compiled three times: as it is, with the exponents that the fp8 recipe
wants for its products but without its casts (exact mode), and with a random power of two on every
value. Losses and gradients are compared with the same compiler's without exponents, and with eager
PyTorch's. Everything is float64: where a model asks for float32 in between (norms, rotations), the
captured graph is given float64 instead, for all four. Mixtures of experts multiply batches of
gathered weights, because PyTorch's grouped product knows no float64.

Finished rows are kept in the results file, and not run again. Eager as what runs the graphs means:
AOTAutograd's, operator by operator.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import harness
from benchmarks.exact import Exact, Step
from benchmarks.models import ZOO
from scaleprop.backends.graphs import Inner, compile_joint
from scaleprop.passes.exponents import carry, has_scale
from scaleprop.passes.structures import register_structures

SPREAD = 6
LIMIT_S = 900.0
LOSS, ANGLE = 1e-12, 1e-10  # how far a loss may be off, relatively; and 1 - a gradient's cosine
MODES = {"exact": "exact mode", "random": "random exponents"}


class Loss(torch.nn.Module):
    """The mean square of everything differentiable that a model returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        leaves = pytree.tree_leaves(self.model(*args, **kwargs))
        return sum((x * x).mean() for x in leaves  # type: ignore[return-value]
                   if isinstance(x, torch.Tensor) and x.requires_grad)


class Anywhere:
    """A random power of two on every value of each joint graph."""

    def __init__(self, inner: Inner) -> None:
        self.inner: Inner = inner
        self.counts = {"graphs": 0, "values": 0, "rescales": 0}
        self.unruled: dict[str, int] = {}

    def __call__(
        self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]
    ) -> Callable[..., Any]:
        return compile_joint(module, example_inputs, self.transform, self.inner)

    def transform(self, joint: torch.fx.GraphModule) -> None:
        """Hold every value anywhere."""
        draw = random.Random(0)
        wanted = {node: draw.randint(-SPREAD, SPREAD) for node in joint.graph.nodes
                  if has_scale(node)}
        carried = carry(joint, wanted)
        self.unruled.update(carried.unruled)
        found = {"graphs": 1, "values": len(wanted), "rescales": len(carried.rescales)}
        self.counts = {key: count + found[key] for key, count in self.counts.items()}


def in_double(module: torch.fx.GraphModule) -> None:
    """Turn what Dynamo captured to float64, in place, wherever it says float32."""
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for node in part.graph.nodes:
            if node.op == "call_method" and node.target == "float":
                node.target = "double"
            node.args, node.kwargs = pytree.tree_map(
                lambda leaf: torch.float64 if leaf is torch.float32 else leaf,
                (node.args, node.kwargs))
        part.recompile()


def loss_and_gradients(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backend: Any
) -> Step:
    """Of one step in float64."""

    def compile_in_double(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        in_double(module)
        return backend(module, example_inputs)

    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(model, backend=compile_in_double)(*args, **kwargs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone()
                           for name, parameter in model.named_parameters()
                           if parameter.grad is not None}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two gradients; 1 where both vanish beside rounding."""
    a, b = a.flatten(), b.flatten()
    if max(a.norm(), b.norm()) < 1e-12:
        return 1.0
    return float((a @ b) / (a.norm() * b.norm()))


def compared(got: Step, want: Step) -> dict[str, Any]:
    """Relative error of the loss, worst cosine of a gradient, and how many are equal in all bits.

    Raises:
        ValueError: where other parameters have gradients.
    """
    if got[1].keys() != want[1].keys():
        raise ValueError(f"other gradients: {sorted(got[1].keys() ^ want[1].keys())}")
    turned = {name: 1.0 - cosine(got[1][name], value) for name, value in want[1].items()}
    return {"loss": float((got[0] - want[0]).abs() / want[0].abs()),
            "angle": max(turned.values()), "worst": max(turned, key=turned.__getitem__),
            "bit_equal": sum(torch.equal(got[1][name], value) for name, value in want[1].items()),
            "of": len(turned)}


def measure(name: str, inner: Inner) -> dict[str, Any]:
    """One model: errors, and what was inserted."""
    started = time.perf_counter()
    sample = ZOO[name]()
    if getattr(sample.model, "_can_set_experts_implementation", bool)():
        sample.model.set_experts_implementation("batched_mm")
    model = Loss(sample.model.double())
    args, kwargs = pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        (sample.args, sample.kwargs))
    with torch.no_grad():
        register_structures(sample.model(*args, **kwargs))  # so that Loss finds their tensors

    def run(backend: Any) -> Step:
        return loss_and_gradients(model, args, kwargs, backend)

    eager = run(lambda module, _: module)
    plain = run(lambda module, given: compile_joint(module, given, lambda joint: None, inner))
    exact, anywhere = Exact(inner), Anywhere(inner)
    steps = {"exact": run(exact), "random": run(anywhere)}
    done = {"exact": {"graphs": len(exact.done),
                      "values": sum(len(found.casts) for found in exact.done),
                      "rescales": sum(found.rescales for found in exact.done)},
            "random": anywhere.counts}
    modes = {mode: {**done[mode], "plain": compared(step, plain), "eager": compared(step, eager)}
             for mode, step in steps.items()}
    return {"modes": modes, "unruled": anywhere.unruled, "compiler": compared(plain, eager),
            "seconds": time.perf_counter() - started}


def passes(row: dict[str, Any], mode: str) -> bool:
    """Whether loss and gradients are what they were."""
    if "error" in row:
        return False
    found = row["modes"][mode]["plain"]
    return found["loss"] <= LOSS and found["angle"] <= ANGLE


def table(results: harness.Results) -> str:
    """Markdown."""
    body: list[list[object]] = []
    for key, row in results.sections.items():
        model, inner = key.split(" | ")
        if "error" in row:
            body.append([model, inner, None, "NO", row["error"]])
            continue
        for mode, found in row["modes"].items():
            plain, eager = found["plain"], found["eager"]
            rules = ", ".join(f"{op} {count}" for op, count in row["unruled"].items()) or None
            body.append([model, inner, MODES[mode], "yes" if passes(row, mode) else "NO",
                         f"{plain['loss']:.0e}", f"{plain['angle']:.0e}",
                         f"{eager['loss']:.0e}", f"{eager['angle']:.0e}",
                         f"{plain['bit_equal']} of {plain['of']}",
                         f"{found['values']} / {found['rescales']}",
                         rules if mode == "random" else None])
    header = ["model", "run by", "what is held elsewhere", "same function", "loss off by",
              "1 - cosine, worst gradient", "loss off eager by", "1 - cosine to eager",
              "gradients bit-equal", "values / rescales", "without a rule"]
    counts = [f"{inner}, {MODES[mode]}: {good} of {total}" for inner, mode, good, total in
              summary(results.sections)]
    return "\n".join([
        "# Exponents in forward and backward: does the function stay what it was?", "",
        f"Machine: {harness.machine_line(results.data['machine'])}", "",
        f"float64; the same function: loss within {LOSS:.0e}, each gradient's cosine within "
        f"{ANGLE:.0e} of 1, against the same compiler without exponents. " + "; ".join(counts)
        + ".", "", harness.markdown_table(header, body)])


def summary(sections: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """What runs the graphs, mode, how many pass, of how many."""
    inners = dict.fromkeys(key.split(" | ")[1] for key in sections)
    rows = {inner: [row for key, row in sections.items() if key.endswith(f" | {inner}")]
            for inner in inners}
    return [(inner, mode, sum(passes(row, mode) for row in rows[inner]), len(rows[inner]))
            for inner in inners for mode in MODES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated models")
    parser.add_argument("--inner", default="eager,inductor")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "INNER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        torch.set_num_threads(1)
        options.out.write_text(json.dumps(measure(*options.worker)))
        return 0
    results = harness.Results("joint_architectures", options.results)
    chosen = options.only.split(",") if options.only else list(ZOO)
    keys = [f"{name} | {inner}" for inner in options.inner.split(",") for name in chosen]
    tasks = [key for key in keys
             if options.redo or "modes" not in results.sections.get(key, {})]

    def work(key: str) -> dict[str, Any]:
        return harness.run_worker("benchmarks.joint_architectures",
                                  ["--worker", *key.split(" | ")], LIMIT_S, {})

    with ThreadPoolExecutor(options.jobs) as pool:
        for key, row in zip(tasks, pool.map(work, tasks), strict=True):
            results.add(key, row)
            results.write_markdown(table(results))
            good = all(passes(row, mode) for mode in MODES)
            print(key, "yes" if good else row.get("error", "NO"), flush=True)
    rows = [results.sections[key] for key in keys]
    good = sum(all(passes(row, mode) for mode in MODES) for row in rows)
    print(f"{good} of {len(rows)} compute what they did")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
