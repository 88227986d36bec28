"""Time and memory to get from a float32 module to a quantized ONNX file on disk.

    python -m benchmarks.compile_cost           # MiniLM three times, the 494M Llama once
    python -m benchmarks.compile_cost --quick   # MiniLM once

scaleprop's compile and export (which loads the written file and checks it against the reference;
‘unchecked’: as the peers, which check nothing) against ``torch.onnx.export`` plus ONNX Runtime's
quantizer. Each run is a process of its own; the tool first takes a tiny model to its file, so that
imports are not counted, and the model is built before the clock starts. Memory is the kernel's
high-water mark of resident bytes, in units of the model's float32 weights: ``peak`` counts the
model itself, ``extra`` only what came on top of it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, peers, workloads
from benchmarks.workloads import Inputs

_TIMEOUT_S = 1800.0
UNCHECKED = ", unchecked"
TOOLS = ("ours int8-dynamic", "ours int8-dynamic" + UNCHECKED, "ORT quantize_dynamic",
         "ours int4", "ours int4" + UNCHECKED, "MatMulNBits 4-bit g128")
PAIRS = {"ours int8-dynamic": "ORT quantize_dynamic", "ours int4": "MatMulNBits 4-bit g128"}
MODELS: dict[str, int] = {"minilm": 3, "llama-494m": 1}  # and how often each is run


def load(name: str) -> tuple[torch.nn.Module, Inputs]:
    """A model and example inputs."""
    if name == "minilm":
        model, tokenizer = workloads.load_minilm()
        return model, workloads.tokenize(tokenizer, ["A sentence of several words."], 128)
    if name == "llama-494m":
        return workloads.llama_half_billion(), (torch.arange(32).reshape(1, 32),)
    if name == "tiny-mlp":
        workload = workloads.TINY[name]()
        return workload.model, workload.inputs
    raise ValueError(f"unknown model {name!r}; there are {[*MODELS, 'tiny-mlp']}")


def produce(tool: str, model: torch.nn.Module, inputs: Inputs, folder: Path) -> dict[str, float]:
    """Run one toolchain to its file ``folder/model.onnx``; seconds by stage."""
    path = folder / "model.onnx"
    large = sum(p.nbytes for p in model.parameters()) > 2**30
    stages: dict[str, float] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        stages[name] = time.perf_counter() - started
        return result

    if tool.startswith("ours "):
        import scaleprop

        recipe, check = tool.removeprefix("ours ").removesuffix(UNCHECKED), UNCHECKED not in tool
        compiled = stage("compile", lambda: scaleprop.compile(model, inputs, recipe=recipe))
        stage("export and check" if check else "export", lambda: compiled.export(path, check=check))
        return stages
    source = folder / "fp32.onnx"
    stage("export", lambda: peers.export_fp32(model, inputs, source, external_data=large))
    if tool == "ORT quantize_dynamic":
        stage("quantize", lambda: peers.ort_quantize_dynamic(source, path, large))
    elif tool == "MatMulNBits 4-bit g128":
        stage("quantize", lambda: peers.ort_matmul_nbits(source, path, 128, external_data=large))
    else:
        raise ValueError(f"unknown tool {tool!r}; there are {TOOLS}")
    return stages


@torch.no_grad()
def worker(name: str, tool: str, threads: int) -> dict[str, Any]:
    """One measurement; runs in a process of its own."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        produce(tool, *load("tiny-mlp"), Path(folder))
    importlib.import_module("transformers")
    gc.collect()
    empty = harness.resident_bytes()
    model, inputs = load(name)
    model(*inputs)  # weights that were only mapped from a file are resident after this
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    gc.collect()
    loaded = harness.resident_bytes()
    with tempfile.TemporaryDirectory() as folder, harness.peak_memory() as peak:
        stages = produce(tool, model, inputs, Path(folder))
        highest = peak()
        size = peers.file_bytes(Path(folder) / "model.onnx")
    return {"stages": stages, "seconds": sum(stages.values()), "weights": weights,
            "peak": (highest - empty) / weights, "extra": (highest - loaded) / weights,
            "file_ratio": size / weights}


def merge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of repeated runs; the first error where one failed."""
    failed = [run for run in runs if "error" in run]
    if failed:
        return dict(failed[0])
    keys = ("seconds", "weights", "peak", "extra", "file_ratio")
    merged: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in keys}
    merged["stages"] = {stage: statistics.median(run["stages"][stage] for run in runs)
                        for stage in runs[0]["stages"]}
    return {**merged, "runs": len(runs)}


def table(results: harness.Results) -> str:
    """The Markdown table."""
    body: list[list[object]] = []
    for key, row in results.sections.items():
        model, tool = key.split(" | ")
        if "error" in row:
            body.append([model, tool, row["error"]])
            continue
        peer = results.sections.get(f"{model} | {PAIRS.get(tool.removesuffix(UNCHECKED), '')}", {})
        ratio = f"{row['seconds'] / peer['seconds']:.2f}" if "seconds" in peer else None
        stages = ", ".join(f"{name} {value:.1f}" for name, value in row["stages"].items())
        body.append([model, tool, f"{row['seconds']:.1f} ({stages})", ratio,
                     f"{row['peak']:.2f}", f"{row['extra']:.2f}", f"{row['file_ratio']:.3f}"])
    header = ["model", "tool", "seconds", "÷ peer's time", "peak ÷ weights", "extra ÷ weights",
              "file ÷ weights"]
    return "\n".join([
        "# From a float32 module to a quantized ONNX file", "",
        f"Machine: {harness.machine_line(results.data['machine'])}", "",
        "‘peak’ counts the float32 model itself, ‘extra’ what came on top of it.", "",
        harness.markdown_table(header, body)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MiniLM once")
    parser.add_argument("--models", help=f"comma-separated, of {', '.join(MODELS)}")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "TOOL"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        options.out.write_text(json.dumps(worker(*options.worker, options.threads)))
        return 0
    chosen = options.models.split(",") if options.models else (
        ["minilm"] if options.quick else [*MODELS])
    results = harness.Results("compile_cost_quick" if options.quick else "compile_cost",
                              options.results)
    for model in chosen:
        for tool in TOOLS:
            key = f"{model} | {tool}"
            if "seconds" in results.sections.get(key, {}) and not options.redo:
                continue
            flags = ["--worker", model, tool, "--threads", str(options.threads)]
            count = 1 if options.quick else MODELS.get(model, 1)
            results.add(key, merge([harness.run_worker(
                "benchmarks.compile_cost", flags, _TIMEOUT_S, {}) for _ in range(count)]))
            results.write_markdown(table(results))
            print(key, results.sections[key], flush=True)
    print(f"wrote {results.json_path} and {results.markdown_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
