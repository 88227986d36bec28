"""How fast casts are: fake quantization of 4096×4096 float32 into preallocated output.

    python -m benchmarks.casts [--quick] [--redo] [--threads 1,2]

Rows: ours through Inductor (the operator, as the inductor backend compiles it, and the function
``scaleprop.fake_quantize`` in a user's own ``torch.compile``); torchao's MX and NVFP4 tensors,
eager and compiled; an emulation in the style of microxcaling (eager, elementwise, log2 and floor).
Every figure is a multiple of the time of ``copy_`` in the same round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

SIZE = 4096
FORMATS = ("mxfp8", "mxfp8:rceil", "mxfp6", "mxfp4", "nvfp4", "fp8", "int8[row]*f32")
COPY = "copy_"
TARGETS = {"mxfp8": 3.0, "mxfp4": 3.0, "nvfp4": 4.0}
_TIMEOUT_S = 1800.0

Cast = Callable[[torch.Tensor], torch.Tensor]


# ------------------------------------------------------------------ candidates


def operator_compiled(name: str) -> Cast:
    """The operator, fused by the decompositions that the inductor backend registers."""
    import scaleprop.backends.inductor  # noqa: F401  registers them

    return lambda x: torch.ops.scaleprop.fake_quantize(x, name)


def function_compiled(name: str) -> Cast:
    """The public function, traced by Dynamo."""
    import scaleprop

    return lambda x: scaleprop.fake_quantize(x, name)


def torchao_mx(element: Any) -> Cast:
    """torchao's MXFP tensor there and back; its floor rule."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return lambda x: MXTensor.to_mx(x, element, 32).dequantize(torch.float32)


def torchao_nvfp4() -> Cast:
    """torchao's NVFP4 tensor there and back, with a tensor scale."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    def cast(x: torch.Tensor) -> torch.Tensor:
        scale = per_tensor_amax_to_scale(x.abs().amax())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    return cast


def elementwise_mx(exponent_bits: int, mantissa_bits: int, maximum: float) -> Cast:
    """MX as eager emulators write it: shared exponents by log2, private ones too, then rounding
    by floor(|x| + 0.5), each step a pass over the tensor."""
    emax = torch.tensor(maximum).log2().floor().item()
    emin = 2.0 - 2.0 ** (exponent_bits - 1)

    def cast(x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(-1, 32)
        amax = blocks.abs().amax(-1, keepdim=True)
        shared = torch.floor(torch.log2(amax + 2.0**-126 * (amax == 0))) - emax
        units = blocks / 2.0**shared
        private = torch.floor(torch.log2(units.abs() + (units == 0))).clip(min=emin)
        steps = units / 2.0**private * 2.0**mantissa_bits
        rounded = torch.sign(steps) * torch.floor(steps.abs() + 0.5)
        result = rounded / 2.0**mantissa_bits * 2.0**private
        return (result.clamp(-maximum, maximum) * 2.0**shared).reshape(x.shape)

    return cast


def candidates() -> dict[str, tuple[Callable[[], Cast], bool]]:
    """Row name → (builder of the cast, whether it is compiled)."""
    rows: dict[str, tuple[Callable[[], Cast], bool]] = {}
    for name in FORMATS:
        rows[f"ours, operator, {name}"] = (lambda name=name: operator_compiled(name), True)
    for name in TARGETS:
        rows[f"ours, function, {name}"] = (lambda name=name: function_compiled(name), True)
    peers: dict[str, Callable[[], Cast]] = {
        "mxfp8": lambda: torchao_mx(torch.float8_e4m3fn),
        "mxfp4": lambda: torchao_mx(torch.float4_e2m1fn_x2),
        "nvfp4": torchao_nvfp4,
    }
    for name, build in peers.items():
        rows[f"torchao compiled, {name}"] = (build, True)
        rows[f"torchao eager, {name}"] = (build, False)
    rows["elementwise eager, mxfp8"] = (lambda: elementwise_mx(4, 3, 448.0), False)
    rows["elementwise eager, mxfp4"] = (lambda: elementwise_mx(2, 1, 6.0), False)
    return rows


def into(cast: Cast, compiled: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """The cast with its result in given memory."""
    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(cast(x))

    return torch.compile(run, fullgraph=True, dynamic=False) if compiled else run


# ------------------------------------------------------------------ measuring


def worker(threads: int, plan: harness.Plan, size: int = SIZE) -> dict[str, Any]:
    """Timings of every row that runs, and the error of every row that does not."""
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = 1000
    torch.manual_seed(0)
    x, out = torch.randn(size, size), torch.empty(size, size)
    runs: dict[str, Callable[[], object]] = {COPY: lambda: out.copy_(x)}
    errors: dict[str, str] = {}
    exact: dict[str, bool] = {}
    for row, (build, compiled) in candidates().items():
        torch._dynamo.reset()
        try:
            call = into(build(), compiled)
            call(x, out)
        except Exception as error:  # noqa: BLE001  a peer that fails is a row with its error
            errors[row] = harness.error_text(error)
            continue
        if row.startswith("ours"):
            exact[row] = _equals_reference(out, x, row.rpartition(", ")[2])
        runs[row] = lambda call=call: call(x, out)
    timings = harness.measure(runs, plan)
    return {"threads": threads, "size": size, "errors": errors, "exact": exact,
            "timings": {name: timing.to_dict() for name, timing in timings.items()}}


def _equals_reference(out: torch.Tensor, x: torch.Tensor, name: str) -> bool:
    from scaleprop.ops import implementations

    expected = implementations.fake_quantize(x, name)
    return torch.equal(out.view(torch.int32), expected.view(torch.int32))


def tables(results: harness.Results) -> str:
    """Markdown: one column per thread count."""
    sections = {key: value for key, value in results.sections.items() if "error" not in value}
    lines = ["# Casts through Inductor", "", harness.machine_line(results.data["machine"]), "",
             f"{SIZE}×{SIZE} float32, fake-quantized into preallocated output: multiples of the "
             "time of `copy_`, median over rounds [quartiles]; CPU time with one thread, wall time "
             "with more. Exact: equal to the reference, bit for bit.", ""]
    body = []
    for row in [COPY, *candidates()]:
        cells = [cell(section, row) for section in sections.values()]
        known = [section["exact"][row] for section in sections.values() if row in section["exact"]]
        target = TARGETS.get(row.rpartition(", ")[2]) if row.startswith("ours") else None
        body.append([row, *cells, {True: "yes", False: "no"}[all(known)] if known else None,
                     f"≤ {target:g}" if target else None])
    header = ["cast", *(f"{key} thread(s)" for key in sections), "exact", "target"]
    return "\n".join([*lines, harness.markdown_table(header, body)])


def cell(section: Mapping[str, Any], row: str) -> str | None:
    """``2.40 [2.38–2.45]``, an error, or None."""
    if row in section["errors"]:
        return section["errors"][row]
    if row not in section["timings"]:
        return None
    clock: harness.Clock = "cpu" if section["threads"] == 1 else "wall"
    copy = harness.Timing.from_dict(section["timings"][COPY])
    mine = harness.Timing.from_dict(section["timings"][row])
    if row == COPY:
        return f"1 ({copy.median_ms(clock):.1f} ms)"
    return str(harness.speedup(copy, mine, clock))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = harness.Plan(rounds=3 if options.quick else 11, min_seconds=0.0, warmup=1)
    if options.worker:
        options.out.write_text(json.dumps(worker(options.worker, plan)))
        return 0
    results = harness.Results("casts_quick" if options.quick else "casts", options.results)
    for threads in options.threads.split(","):
        if threads in results.sections and not options.redo:
            continue
        flags = ["--worker", threads] + ["--quick"] * options.quick
        section = harness.run_worker("benchmarks.casts", flags, _TIMEOUT_S,
                                     {"OMP_NUM_THREADS": threads})
        results.add(threads, section)
    text = tables(results)
    results.write_markdown(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
