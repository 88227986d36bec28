"""Do scales pass through forward and backward of every architecture without changing anything?

    python -m benchmarks.joint_architectures [--only llama,t5] [--inner eager,inductor] [--jobs 2]

Each model is compiled in float64 (float32 for mixtures of experts, whose grouped product knows no
other) with a random power of two on every value of its joint graph. Its loss and gradients are
compared with eager PyTorch's, and with the same compiler's without exponents: Inductor by itself
sums in another order, and many models compute norms in float32. Eager as what runs the graphs
means: AOTAutograd's, operator by operator.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks import harness
from benchmarks.models import ZOO
from scaleprop.backends.dynamo import Inner, compile_joint
from scaleprop.passes.exponents import carry, has_scale
from scaleprop.passes.structures import register_structures

RESULTS = Path(__file__).parent / "results" / "joint_architectures.json"
MARK = "RESULT "
SPREAD = 6
LIMIT = 900.0


class Loss(torch.nn.Module):
    """The mean square of everything differentiable that a model returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        leaves = pytree.tree_leaves(self.model(*args, **kwargs))
        return sum((x * x).mean() for x in leaves  # type: ignore[return-value]
                   if isinstance(x, torch.Tensor) and x.requires_grad)


def loss_and_gradients(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of one step."""
    model.zero_grad()
    loss = model(*args, **kwargs)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone()
                           for name, parameter in model.named_parameters()
                           if parameter.grad is not None}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two gradients; 1 where both vanish beside rounding."""
    a, b = a.double().flatten(), b.double().flatten()
    if max(a.norm(), b.norm()) < 1e-12:
        return 1.0
    return float((a @ b) / (a.norm() * b.norm()))


def measure(name: str, inner: Inner) -> dict[str, Any]:
    """One model: errors, and what was inserted."""
    sample = ZOO[name]()
    dtype = torch.float32 if name in ("mixtral", "qwen3moe", "gptoss") else torch.float64
    model = Loss(sample.model.to(dtype))
    args, kwargs = pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        (sample.args, sample.kwargs))
    with torch.no_grad():
        register_structures(sample.model(*args, **kwargs))  # so that Loss finds their tensors
    counts = {"values": 0, "rescales": 0, "graphs": 0}
    unruled: dict[str, int] = {}

    def transform(joint: torch.fx.GraphModule) -> None:
        draw = random.Random(0)
        wanted = {node: draw.randint(-SPREAD, SPREAD) for node in joint.graph.nodes
                  if has_scale(node)}
        carried = carry(joint, wanted)
        unruled.update(carried.unruled)
        counts["graphs"] += 1
        counts["values"] += len(wanted)
        counts["rescales"] += len(carried.rescales)

    def run(rewrite: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend=lambda graph, inputs: compile_joint(graph, inputs, rewrite, inner))
        loss, gradients = loss_and_gradients(compiled, args, kwargs)
        return loss, {key.removeprefix("_orig_mod."): value for key, value in gradients.items()}

    eager, plain = loss_and_gradients(model, args, kwargs), run(lambda joint: None)
    loss, gradients = run(transform)
    assert gradients.keys() == eager[1].keys(), "other parameters received gradients"

    def worst(reference: dict[str, torch.Tensor]) -> float:
        return min(cosine(gradients[key], value) for key, value in reference.items())

    return {"model": name, "inner": inner, "dtype": str(dtype).removeprefix("torch."), **counts,
            "unruled": unruled, "parameters": len(gradients),
            "loss_error": float((loss - plain[0]).abs() / plain[0].abs()),
            "loss_error_eager": float((loss - eager[0]).abs() / eager[0].abs()),
            "cosine": worst(plain[1]), "cosine_eager": worst(eager[1]),
            "bit_equal": sum(torch.equal(gradients[key], plain[1][key]) for key in gradients)}


def passes(row: dict[str, Any]) -> bool:
    """Whether loss and gradients are what they were: 1e-12 and 1e-10 in float64."""
    if "error" in row:
        return False
    loss, angle = (1e-12, 1e-10) if row["dtype"] == "float64" else (1e-6, 1e-6)
    return row["loss_error"] <= loss and 1.0 - row["cosine"] <= angle


def in_child(name: str, inner: str) -> dict[str, Any]:
    """A crash or a hang of one model is that model's row."""
    command = [sys.executable, "-m", "benchmarks.joint_architectures", "--child", name, inner]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"model": name, "inner": inner, "error": f"no result after {LIMIT:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK))
    return {"model": name, "inner": inner, "error": (done.stderr.strip() or "?").splitlines()[-1]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    body: list[list[object]] = []
    for row in rows:
        if "error" in row:
            body.append([row["model"], row["inner"], row["error"], *[None] * 8])
            continue
        rules = ", ".join(f"{op} {count}" for op, count in row["unruled"].items()) or "–"
        body.append([row["model"], row["inner"], "yes" if passes(row) else "NO", row["dtype"],
                     f"{row['loss_error']:.1e}", f"{1 - row['cosine']:.1e}",
                     f"{row['loss_error_eager']:.1e}", f"{1 - row['cosine_eager']:.1e}",
                     f"{row['bit_equal']} of {row['parameters']}",
                     f"{row['values']} / {row['rescales']}", rules])
    return "\n".join([
        "# A random power of two on every value, forward and backward", "",
        f"Machine: {harness.machine_line(harness.machine())}", "",
        harness.markdown_table(["model", "run by", "same function", "dtype", "loss off by",
                                "1 - cosine, worst gradient", "loss off eager by",
                                "1 - cosine to eager", "gradients bit-equal",
                                "values / rescales", "without a rule"], body), ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated models")
    parser.add_argument("--inner", default="eager,inductor")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        torch.set_num_threads(1)
        print(MARK + json.dumps(measure(*options.child)))
        return 0
    chosen = options.only.split(",") if options.only else list(ZOO)
    tasks = [(name, inner) for inner in options.inner.split(",") for name in chosen]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = []
        for row in pool.map(lambda task: in_child(*task), tasks):
            rows.append(row)
            print(row, flush=True)
    if not options.only:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(table(rows))
    good = sum(map(passes, rows))
    print(f"{good} of {len(rows)} compute what they did")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
