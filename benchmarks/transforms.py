"""Every method on every architecture: where it applies, what is left at run time, what is refused.

    python -m benchmarks.transforms [--only llama,vit] [--methods smooth,rotate]

Each of the 25 models of ``benchmarks.models`` gets random gains and biases, is captured, given
formats (``int4-int8-token``, or those that a method is for), widened to float64 and calibrated on
its own inputs; each method transforms it, and the result is compared with the model it was. Fails
where an output differs by more than 1e-10 of its largest value. Writes
``benchmarks/results/transforms.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch.utils import _pytree as pytree

from benchmarks import harness
from benchmarks.models import ZOO
from scaleprop.errors import CaptureError, ScalePropError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.base import PassManager, Program, relative_error, run_as_is, widened
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.methods import METHODS
from scaleprop.recipes import named_recipe

RESULTS = harness.RESULTS / "transforms.json"
LIMIT = 1e-10
FORMATS = "int4-int8-token"
# methods for static scales, for blocks and for floats
RECIPES: Mapping[str, str] = {
    "merge-quant": "int4-int4-static", "reorder": "mxfp4", "float-search": "fp8"}
# before methods that expect it: a rotation stops at gains, what equalises weights at batch norms
FIRST: Mapping[str, tuple[str, ...]] = {
    "rotate": ("fold-norms",), "learn-rotation": ("fold-norms",),
    "equalise": ("fold-batch-norms",)}


def prepared(name: str, recipes: Iterable[str]) -> dict[str, Program]:
    """Recipe → one model with its formats, in float64; gains and biases are no longer 1 and 0."""
    sample = ZOO[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in sample.model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    captured = capture(sample.model, sample.args, sample.kwargs, None)
    canonical = PassManager([CleanUp(), Canonicalise()]).run(captured)
    found: dict[str, Program] = {}
    for recipe in recipes:
        assign = AssignFormats(recipe=named_recipe(recipe))
        found[recipe] = widened(PassManager([assign]).run(canonical))
    return found


def calibrated(program: Program, method: Any) -> Program:
    """With the statistics that ``method`` reads."""
    if not method.needs.anything:
        return program
    data = [(program.example_args, dict(program.example_kwargs))]
    needs = method.needs
    step = Calibrate(data=data, everything=True, channels=needs.channels, sample=needs.sample,
                     moments=needs.moments)
    return PassManager([step]).run(program)


def cell(program: Program, name: str) -> dict[str, Any]:
    """One method on one model."""
    began = time.perf_counter()
    known = {method.name: method for method in METHODS}
    changed = program
    try:
        for part in (*FIRST.get(name, ()), name):
            changed = PassManager([known[part]()]).run(calibrated(changed, known[part]))
    except ScalePropError as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    records = [record for record in changed.transforms if record.by == name]
    applied = [record for record in records if record.refused is None]
    return {
        "error": difference(program, changed),
        "free": sum(not record.runtime for record in applied),
        "runtime": sum(bool(record.runtime) for record in applied),
        "refused": Counter(_reason(record.refused) for record in records if record.refused),
        "seconds": time.perf_counter() - began,
    }


def _reason(text: str) -> str:
    """The first reason, without where it was found and how much it was."""
    first = text.split(";")[0].rpartition("): ")[2].strip() or text
    return re.sub(r"\d[\d.e+-]*", "…", first)


def difference(before: Program, after: Program) -> float:
    """The largest difference of an output, relative to its largest value."""
    pairs = zip(*(pytree.tree_leaves(run_as_is(program)) for program in (before, after)),
                strict=True)  # fmt: skip
    return max(relative_error(got, want) for want, got in pairs
               if isinstance(want, torch.Tensor) and want.is_floating_point())


def preserving() -> list[str]:
    """The methods that promise to keep the function."""
    return [method.name for method in METHODS if method.preserves_function]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Architectures by methods: free + at run time, − refused; then the reasons, counted."""
    methods = list(dict.fromkeys(name for cells in found.values() for name in cells))
    rows = ["| architecture | " + " | ".join(methods) + " | largest error |",
            "| --- " * (len(methods) + 2) + "|"]
    reasons: Counter[tuple[str, str]] = Counter()
    for model, cells in found.items():
        worst = max((part["error"] for part in cells.values() if "error" in part), default=0.0)
        rows.append(f"| {model} | " + " | ".join(_text(cells.get(name)) for name in methods)
                    + f" | {worst:.1e} |")
        for name, part in cells.items():
            reasons.update({(name, why): count
                            for why, count in part.get("refused", {}).items()})
    rows += ["", "| method | refused because | times |", "| --- | --- | --- |"]
    rows += [f"| {name} | {why} | {count} |" for (name, why), count in sorted(reasons.items())]
    return "\n".join(rows)


def _text(part: Mapping[str, Any] | None) -> str:
    if part is None:
        return ""
    if "failed" in part:
        return part["failed"].split(":")[0]
    refused = sum(part["refused"].values())
    text = f"{part['free']}" + (f" + {part['runtime']}" if part["runtime"] else "")
    return text + (f" − {refused}" if refused else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write, and fail where a function was not kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(ZOO))
    parser.add_argument("--methods", default=",".join(preserving()))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = (
        json.loads(options.results.read_text()) if options.results.exists() else {})
    for model in track(options.only.split(","), "architectures"):
        try:
            programs = prepared(model, {FORMATS, *RECIPES.values()})
        except CaptureError as error:
            print(f"{model}: not captured: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for name in options.methods.split(","):
            found.setdefault(model, {})[name] = cell(
                programs[RECIPES.get(name, FORMATS)], name)
        options.results.write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    options.results.with_suffix(".md").write_text(
        "# Methods by architecture\n\nRegions whose transform parameters absorb, + those that "
        f"leave an operator at run time, − those refused. Function kept to {LIMIT:.0e} in "
        f"float64.\n\n{text}\n")
    print(text)
    broken = [(model, name, part) for model, cells in found.items() for name, part in cells.items()
              if not part.get("error", 1.0) <= LIMIT]
    for model, name, part in broken:
        print(f"{model}, {name}: {part.get('failed', part.get('error'))}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
