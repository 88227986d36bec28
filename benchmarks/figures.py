"""The few figures of each benchmark that a summary shows, read from what it wrote.

Each function takes a benchmark's data (its JSON, or the rows of its CSV) and returns label →
figure. Rows with an error are left out; whoever wants them reads the tables.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import Clock, Timing, speedup

Figures = dict[str, float | str]
Extractor = Callable[[Any], Figures]
LOSS, ANGLE = 1e-12, 1e-10  # within which benchmarks.joint_architectures calls functions the same


def times(timings: Mapping[str, Any], of: str, over: str, clock: Clock = "cpu") -> float:
    """How many times faster ``of`` was than ``over``: median over rounds."""
    return speedup(Timing.from_dict(timings[of]), Timing.from_dict(timings[over]), clock).median


def mean(ratios: Iterable[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def good(data: Mapping[str, Any]) -> list[Any]:
    """Sections without an error."""
    return [section for section in data["sections"].values() if "error" not in section]


def share(passed: Iterable[bool]) -> str:
    """How many of how many."""
    each = list(passed)
    return f"{sum(each)} of {len(each)}"


def ort_vs_peers(data: Any) -> Figures:
    found: Figures = {}
    for recipe in ("int8", "int8-dynamic", "int4"):
        pairs = [(section["rows"].get(f"ours {recipe}"), section["rows"]["ORT fp32"])
                 for section in good(data)]
        ratios = [times({"a": ours["timings"]["1"], "b": plain["timings"]["1"]}, "a", "b")
                  for ours, plain in pairs if ours and not ours["error"]]
        found[f"{recipe} × float32, {len(ratios)} workloads"] = mean(ratios)
    return found


def minilm_fidelity(data: Any) -> Figures:
    return {f"cosine {recipe}": data["sections"][f"ours {recipe}"]["mean"]
            for recipe in ("int8-dynamic", "mxfp8", "mxfp4", "nvfp4")
            if "mean" in data["sections"].get(f"ours {recipe}", {})}


def compile_cost(data: Any) -> Figures:
    found: Figures = {}
    rows = {key: row for key, row in data["sections"].items() if "error" not in row}
    for model in sorted({key.split(" | ")[0] for key in rows}):
        for recipe, peer in (("int8-dynamic", "ORT quantize_dynamic"),
                             ("int4", "MatMulNBits 4-bit g128")):
            ours, other = rows.get(f"{model} | ours {recipe}"), rows.get(f"{model} | {peer}")
            if ours and other:
                found[f"{model} {recipe}, checked: time ÷ peer's"] = (
                    ours["seconds"] / other["seconds"])
    return found


def architectures(data: Any) -> Figures:
    recipes = dict.fromkeys(row["recipe"] for row in data)
    return {f"{recipe} agrees": share(row["status"] == "ok" for row in data
                                      if row["recipe"] == recipe) for recipe in recipes}


def joint_architectures(data: Any) -> Figures:
    def same(section: Any, mode: str) -> bool:
        row = section.get("modes", {}).get(mode, {}).get("plain")
        return bool(row) and row["loss"] <= LOSS and row["angle"] <= ANGLE

    return {f"{mode} exponents, same function": share(
        same(section, mode) for section in data["sections"].values())
        for mode in ("exact", "random")}


def training_overhead(data: Any) -> Figures:
    found: Figures = {}
    for candidate, label in (("fp32", "pass-through"), ("exact", "exact mode")):
        found[f"{label}: step ÷ Inductor's, worst"] = max(
            1 / times(section["steps"], candidate, "inductor") for section in good(data))
    return found


def learning_rate_transfer(data: Any) -> Figures:
    found: Figures = {}
    for recipe, section in data["sections"].items():
        best = {width: min(losses, key=losses.__getitem__)
                for width, losses in section["losses"].items()}
        found[f"{recipe}: best rates of the grid"] = ", ".join(
            f"2^{exponent} at {width}" for width, exponent in best.items())
    return found


def unit_scaling(data: Any) -> Figures:
    def least(key: str) -> str:
        return format(min(row[key] for row in data["rows"]), ".2f")

    return {f"{way}, least share in [1/8, 8]": f"{least(f'{way}_before')} → {least(f'{way}_after')}"
            for way in ("forward", "backward")}


def ort_kernels(data: Any) -> Figures:
    found: dict[str, list[float]] = {}
    for key, entries in data["sections"].items():
        found.setdefault(key.split()[0], []).append(float(entries[-1]["ratio"].split()[0]))
    return {f"{recipe} × float32": mean(ratios) for recipe, ratios in found.items()}


def inductor_linears(data: Any) -> Figures:
    def versus(recipe: str, over: str) -> float:
        return mean(times(section["timings"], recipe, over) for section in good(data)
                    if {recipe, over} <= set(section["timings"]))

    return {"int8 × float32": versus("int8", "torch.compile fp32"),
            "int8 ÷ PT2E static": versus("int8", "PT2E static"),
            "int8-dynamic ÷ PT2E dynamic": versus("int8-dynamic", "PT2E dynamic")}


def casts(data: Any) -> Figures:
    timings = data["sections"]["1"]["timings"]
    return {f"{name} ÷ copy_": 1 / times(timings, f"ours, operator, {name}", "copy_")
            for name in ("mxfp8", "mxfp4", "nvfp4")}


def optimizer_state(data: Any) -> Figures:
    section = next(iter(good(data)))
    steps, size = section["steps"], section["bytes"]
    return {f"{name}: step ÷ foreach's": 1 / times(steps, name, "foreach")
            for name in ("fp16", "fp8")} | {
        f"{name}: times smaller": size["foreach"] / size[name] for name in ("fp16", "fp8")}


def gptq_layer(data: Any) -> Figures:
    both = [section["timings"] for section in good(data) if "torchao" in section["timings"]]
    return {"time ÷ torchao's, worst": max(1 / times(each, "ours", "torchao") for each in both)}


def post_training(data: Any) -> Figures:
    """The best of ours and of the peers, by divergence from float32."""
    peers = ("torchao", "ONNX Runtime", "ORT", "llm-compressor")
    found: Figures = {}
    for fmt in ("W4A4", "NVFP4"):
        cells = {key.split("|")[2]: cell["divergence"] for key, cell in data.items()
                 if key.startswith(f"lm+outliers|{fmt}|") and "divergence" in cell}
        for who, names in (("ours", [name for name in cells if not name.startswith(peers)]),
                           ("peers", [name for name in cells if name.startswith(peers)])):
            if names:
                best = min(names, key=cells.__getitem__)
                found[f"{fmt}, outliers: best of {who}"] = f"{cells[best]:.2g} ({best})"
    return found


def kernel_instructions(data: Any) -> Figures:
    return {"kernels within what memory has time for": share(
        row["instructions"] <= row["time for"] for row in data.values())}


def kernels_static(data: Any) -> Figures:
    cells = [cell for row in data.values() for cell in row.values()]
    return {"builds without a spill": share(cell["spilled"] == 0 for cell in cells)}


def device_rows(data: Any) -> Figures:
    return {"rows measured": share("error" not in row for row in data["sections"].values())}


def transforms(data: Any) -> Figures:
    cells = [cell for row in data.values() for cell in row.values()]
    return {"functions kept": share(cell.get("error", math.inf) <= 1e-10 for cell in cells),
            "worst error": f"{max(cell.get('error', math.inf) for cell in cells):.1e}"}


def training_recipes(data: Any) -> Figures:
    sections = data["sections"]
    base = sections["bf16"]["losses"]
    gaps = {name: 100 * statistics.fmean(loss / other - 1 for loss, other in zip(
        sections[name]["losses"], base, strict=False))
        for name in ("fp8", "mxfp8", "nvfp4", "mxfp4-quartet") if name in sections}
    return {f"{name}: loss to bf16's": f"{gap:+.2f} %" for name, gap in gaps.items()}


def emulated_step(data: Any) -> Figures:
    steps = data["sections"]["steps"]
    return {f"{name} step ÷ BF16's": 1 / times(steps, name, "bf16", "wall")
            for name in ("mxfp8", "nvfp4")}


def int4_cnn(data: Any) -> Figures:
    rows = good(data)
    return {"accuracy, float32": f"{statistics.fmean(row['float32'] for row in rows):.2f} %",
            "in 4 bits": f"{statistics.fmean(row['int4'] for row in rows):.2f} %"}


def equal_weights(data: Mapping[str, Any]) -> int:
    """How many of the weights that were compared had no part that differs."""
    return len(data["compared"]) - len({name.rpartition("_")[0] for name in data["different"]})


def larger_than_memory(data: Any) -> Figures:
    peak = max(run["peak_vm"] for run in data["runs"])
    return {"model ÷ memory limit": data["model_bytes"] / data["limit"],
            "peak address space ÷ limit": peak / data["limit"],
            "layers in memory, most": max(data["needed"].values()),
            "weights compared and equal": f"{equal_weights(data)} of {len(data['compared'])}"}


def fp4_design_space(rows: Sequence[Mapping[str, str]]) -> Figures:
    combinations = [row for row in rows if row["kind"] == "combination" and row["gap_percent"]]
    best = min(combinations, key=lambda row: float(row["gap_percent"]))
    name = ", ".join(value for key, value in best.items() if value and key in (
        "*.format", "gradients", "rotation", "*.scaling", "input of wgrad"))
    return {"combinations": float(len(combinations)),
            "smallest gap to bf16": f"{float(best['gap_percent']):+.2f} % ({name})"}
