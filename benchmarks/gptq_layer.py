"""One layer's weights rounded by GPTQ: time and output error, against torchao's prototype.

    python -m benchmarks.gptq_layer [--quick] [--redo] [--threads 1]

Both get the same weight and the same second moment of its inputs; timed is everything from there
to codes and scales. Error: tr(E H Eᵀ), E the weight's error, ÷ that of rounding to nearest.
torchao's function asserts that it is on a GPU and then synchronises with one; nothing else in it
needs one. Here assertions are off (``PYTHONOPTIMIZE=1``) and that call does nothing. Its 4-bit
integers need a package of GPU kernels. Fails where a layer takes longer than torchao's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness

SHAPES = ((384, 384), (1536, 384), (384, 1536))  # outputs × inputs
FORMATS = {"int8[row]*f32": "int8", "nvfp4": "nvfp4", "int4[1x128]*f32+zp": "int4"}
TOKENS = 2048
LIMIT = 1.0  # our time ÷ torchao's
_TIMEOUT_S = 1800.0
_SMALL = (48, 64)  # for trying the benchmark


def layer(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, size] and Σ x xᵀ of inputs with a few strong directions."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(TOKENS, 8, generator=generator) @ torch.randn(8, size, generator=generator)
    x = mixed + 0.5 * torch.randn(TOKENS, size, generator=generator)
    return torch.randn(rows, size, generator=generator) * 0.05, x.t() @ x


def torchao_solver(kind: str) -> Callable[[Tensor, Tensor], Any]:
    """torchao's GPTQ of one weight, for a CPU; see the module's docstring."""
    from torchao.prototype.gptq.api import GPTQConfig, gptq_quantize
    from torchao.prototype.mx_formats.inference_workflow import (
        NVFP4DynamicActivationNVFP4WeightConfig,
    )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerRow

    configs: dict[str, Callable[[], Any]] = {
        "int8": lambda: Int8WeightOnlyConfig(granularity=PerRow()),
        "nvfp4": lambda: NVFP4DynamicActivationNVFP4WeightConfig(use_dynamic_per_tensor_scale=True),
        "int4": lambda: Int4WeightOnlyConfig(group_size=128),
    }
    config = GPTQConfig(step="convert", base_config=configs[kind]())
    torch.cuda.synchronize = lambda device=None: None
    # it writes into both arguments
    return lambda weight, moment: gptq_quantize(moment.clone(), weight.clone(), config)


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ)."""
    d = weight.double() - approximation.double()
    return float(((d @ moment.double()) * d).sum())


def measure(rows: int, size: int, fmt: str, plan: harness.Plan) -> dict[str, Any]:
    """Timings and errors of one weight in one format."""
    from scaleprop.formats import quantize
    from scaleprop.passes.compensation import compensated

    weight, moment = layer(rows, size)
    solvers: dict[str, Callable[[], Any]] = {
        "ours": lambda: compensated(weight, fmt, moment),
        "ours, act-order": lambda: compensated(weight, fmt, moment, act_order=True),
    }
    found: dict[str, Any] = {"errors": {}, "loss": {}}
    try:
        theirs = torchao_solver(FORMATS[fmt])
        theirs(weight, moment)
        solvers["torchao"] = lambda: theirs(weight, moment)
    except Exception as error:  # noqa: BLE001  a peer that fails is a row with its error
        found["errors"]["torchao"] = harness.error_text(error)
    nearest = output_error(weight, quantize(weight, fmt).dequantize(), moment)
    for name, solve in solvers.items():
        result = solve().dequantize(torch.float32)
        found["loss"][name] = output_error(weight, result, moment) / nearest
    timings = harness.measure(solvers, plan)
    found["timings"] = {name: timing.to_dict() for name, timing in timings.items()}
    return found


def ratio(row: dict[str, Any], name: str) -> harness.Ratio | None:
    """Our time ÷ torchao's."""
    timings = {key: harness.Timing.from_dict(found) for key, found in row["timings"].items()}
    return harness.speedup(timings["torchao"], timings[name], "cpu") if "torchao" in timings \
        else None  # fmt: skip


def tables(results: harness.Results) -> tuple[str, bool]:
    """Markdown, and whether every layer that torchao solves takes us no longer."""
    body: list[list[object]] = []
    kept = True
    for key, row in results.sections.items():
        if "error" in row:
            body.append([key, None, row["error"], None, None, None])
            kept = False
            continue
        for name, found in row["timings"].items():
            timing = harness.Timing.from_dict(found)
            relative = None if name == "torchao" else ratio(row, name)
            if name == "ours" and relative is not None:
                kept = kept and relative.median <= LIMIT
            target = f"≤ {LIMIT:g}" if name == "ours" and relative is not None else None
            body.append([key, name, f"{timing.median_ms('cpu'):.1f}", relative, target,
                         f"{row['loss'][name]:.3f}"])
        for name, text in row["errors"].items():
            body.append([key, name, text, None, None, None])
    lines = ["# GPTQ, one layer", "", harness.machine_line(results.data["machine"]), "",
             "Weights [outputs × inputs] and the second moment of their inputs become codes and "
             "scales. CPU time, median over rounds; ÷ torchao's: [quartiles]. Error of the output, "
             "of rounding to nearest 1.", ""]
    header = ["layer", "by", "ms", "÷ torchao's", "target", "error"]
    return "\n".join([*lines, harness.markdown_table(header, body)]), kept


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write the tables; 1 where a layer takes longer than torchao's."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--small", action="store_true", help="one small layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", nargs=3, metavar=("ROWS", "SIZE", "FORMAT"),
                        help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = harness.Plan(rounds=3 if options.quick else 11, min_seconds=0.0, warmup=1)
    if options.worker:
        torch.set_num_threads(options.threads)
        rows, size, fmt = options.worker
        options.out.write_text(json.dumps(measure(int(rows), int(size), fmt, plan)))
        return 0
    name = "gptq_layer_quick" if options.quick else "gptq_layer"
    results = harness.Results(name, options.results)
    for rows, size in [_SMALL] if options.small else SHAPES:
        for fmt in FORMATS:
            key = f"{rows}×{size} {fmt}" + f", {options.threads} threads" * (options.threads > 1)
            if key in results.sections and not options.redo:
                continue
            flags = ["--worker", str(rows), str(size), fmt, "--threads", str(options.threads)]
            environment = {"PYTHONOPTIMIZE": "1", "OMP_NUM_THREADS": str(options.threads)}
            flags += ["--quick"] * options.quick
            results.add(key, harness.run_worker("benchmarks.gptq_layer", flags, _TIMEOUT_S,
                                                environment))
    text, kept = tables(results)
    results.write_markdown(text)
    print(text)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
