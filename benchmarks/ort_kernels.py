"""One quantized linear on onnxruntime: every candidate lowering, its speed, error and bound.

    python -m benchmarks.ort_kernels             # all formats and shapes
    python -m benchmarks.ort_kernels --quick     # one shape, few rounds
    python -m benchmarks.ort_kernels --only mxfp4,nvfp4 --all

Each format pair × (K, N) × M is one section: the lowering that the cost model chooses (``--all``:
every candidate) against a float32 MatMul and Add, in the same interleaved rounds, one thread, CPU
time. Inputs are Gaussian. Errors are max|y - reference| / max|reference|, where the reference is
``scaleprop::scaled_mm`` (float64 sums rounded once). ``estimate`` is the cost model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from benchmarks import harness
from benchmarks.harness import Plan
from scaleprop import formats
from scaleprop.backends.onnxruntime.builder import GraphBuilder
from scaleprop.backends.onnxruntime.emitter import IR_VERSION, OPSET
from scaleprop.backends.onnxruntime.quantized import products
from scaleprop.backends.onnxruntime.quantized.emit import Emitter
from scaleprop.backends.onnxruntime.quantized.operand import Quantized
from scaleprop.backends.onnxruntime.quantized.products import Candidate, Problem
from scaleprop.backends.onnxruntime.quantized.weights import Weight
from scaleprop.formats import ScaledTensor

PAIRS = {  # recipe-like name → (activation, weight)
    "int8-dynamic": ("int8+zp", "int8[row]*f32"), "int8-token": ("int8[row]*f32", "int8[row]*f32"),
    "int8-weight": ("f32", "int8[row]*f32"), "int4": ("f32", "int4[1x128]*f32"),
    "int4-g32": ("f32", "int4[1x32]*f32"), "int4-int8": ("int8[1x128]*f32", "int4[1x128]*f32"),
    "int2": ("f32", "int2"), "fp8": ("fp8", "e4m3[row]*f32"), "fp8-weight": ("f32", "fp8"),
    "mxfp8": ("mxfp8", "mxfp8"), "mxfp6": ("mxfp6", "mxfp6"), "mxfp4": ("mxfp4", "mxfp4"),
    "mxfp4-weight": ("f32", "mxfp4"), "nvfp4": ("nvfp4", "nvfp4"),
    "nvfp4-weight": ("f32", "nvfp4"),
}
SHAPES = ((2048, 2048), (1024, 4096), (4096, 1024))
ROWS = (1, 32, 128, 512)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A session on a written file, what the file weighs and how long loading took."""

    session: ort.InferenceSession
    nbytes: int
    load_seconds: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"x": x.numpy()})[0])


def load(emitter: Emitter, output: ir.Value, n: int) -> Loaded:
    """Write the graph, load it with default session options on one thread."""
    builder = emitter.builder
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", n])
    builder.graph.outputs.append(output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "linear.onnx"
        ir.save(ir.Model(builder.graph, ir_version=IR_VERSION), path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        start = time.perf_counter()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return Loaded(session, path.stat().st_size, time.perf_counter() - start)


def start(k: int) -> tuple[Emitter, ir.Value]:
    """An empty graph with its input x [rows, k]."""
    builder = GraphBuilder("linear", OPSET)
    x = ir.Value(name="x", shape=ir.Shape(["rows", k]), type=ir.TensorType(ir.DataType.FLOAT))
    builder.graph.inputs.append(x)
    return Emitter(builder), x


def float_linear(weight: torch.Tensor, bias: torch.Tensor) -> Loaded:
    """The float32 linear."""
    e, x = start(weight.shape[1])
    y = e("MatMul", x, e.builder.initializer(weight.t(), "w"))
    return load(e, e("Add", y, e.builder.initializer(bias, "b")), weight.shape[0])


@dataclasses.dataclass(frozen=True)
class Linear:
    """A quantized weight, a bias, and the format of the activation (``f32``: none)."""

    x_format: str
    weight: ScaledTensor
    bias: torch.Tensor

    def problem(self, rows: int) -> tuple[Emitter, Problem]:
        """A new graph and the product to lower into it."""
        e, x = start(self.weight.shape[1])
        fmt = None if self.x_format == "f32" else formats.parse(self.x_format)
        operand = Quantized(e, x, fmt, 2, self.weight.shape[1])
        return e, Problem(operand, Weight(self.weight, "w"), rows, self.bias)

    def load(self, candidate: Candidate, rows: int) -> Loaded:
        """This candidate in a session."""
        e, problem = self.problem(rows)
        return load(e, candidate.emit(e, problem), self.weight.shape[0])

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """What the operators say."""
        parts = [x] if self.x_format == "f32" else torch.ops.scaleprop.quantize(x, self.x_format)
        return torch.ops.scaleprop.scaled_mm(parts, self.weight.parts, self.bias, self.x_format,
                                             str(self.weight.format), x.shape[-1])


def section(linear: Linear, high: Loaded, rows: int, plan: Plan,
            everything: bool) -> list[dict[str, Any]]:
    """Rows of one table: float32 first, then the candidates, the chosen one marked."""
    _, problem = linear.problem(rows)
    chosen = products.choose(problem)
    listed = list(products.candidates(problem)) if everything else [chosen]
    loaded = {c: linear.load(c, rows) for c in listed}
    x = torch.randn(rows, linear.weight.shape[1])
    runs = {"float32": lambda: high(x), **{c.name: lambda m=m: m(x) for c, m in loaded.items()}}
    timings = harness.measure(runs, plan)
    want = linear.reference(x).double()
    entries: list[dict[str, Any]] = [
        {"name": "float32", "ms": timings["float32"].median_ms("cpu")}]
    for candidate, model in loaded.items():
        ratio = harness.speedup(timings[candidate.name], timings["float32"], "cpu")
        error = float((model(x).double() - want).abs().max() / want.abs().max())
        entries.append({
            "name": candidate.name, "chosen": candidate == chosen,
            "ms": timings[candidate.name].median_ms("cpu"), "ratio": str(ratio), "error": error,
            "bound": candidate.error(problem), "estimate_ms": 1e3 * candidate.seconds(problem),
            "share": model.nbytes / high.nbytes, "load_s": model.load_seconds})
    return entries


def report(results: harness.Results) -> str:
    """All sections as one table."""
    lines: list[list[object]] = []
    for key, entries in results.sections.items():
        for entry in entries[1:]:
            mark = " *" if entry["chosen"] else ""
            lines.append([key, entry["name"] + mark, entry["ratio"], f"{entry['ms']:.3f}",
                          f"{entry['estimate_ms']:.3f}", f"{entry['error']:.1e}",
                          f"{entry['bound']:.1e}", f"{entry['share']:.3f}",
                          f"{entry['load_s']:.2f}"])
    header = ["linear", "lowering", "× float32", "ms", "estimate", "error", "bound", "file",
              "load s"]
    return f"{harness.machine_line(results.data['machine'])}\n\n" + \
        harness.markdown_table(header, lines)


def main() -> None:
    """Measure what is asked for and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--only", help="names, by commas", default=",".join(PAIRS))
    parser.add_argument("--all", action="store_true", help="every candidate, not the chosen one")
    parser.add_argument("--redo", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    plan = Plan(rounds=5, min_seconds=0.01) if options.quick else Plan(rounds=11)
    name = "ort_kernels" + ("_quick" if options.quick else "")
    results = harness.Results(name, fresh=options.redo)
    for k, n in SHAPES[:1] if options.quick else SHAPES:
        torch.manual_seed(0)
        weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
        high = float_linear(weight, bias)
        for recipe in options.only.split(","):
            x_format, w_format = PAIRS[recipe]
            linear = Linear(x_format, formats.quantize(weight, w_format), bias)
            for rows in ROWS:
                key = f"{recipe} {rows}×{k}×{n}"
                if key not in results.sections:
                    results.add(key, section(linear, high, rows, plan, options.all))
                    print(key, results.sections[key][-1]["ratio"], flush=True)
    results.write_markdown(report(results))


if __name__ == "__main__":
    main()
