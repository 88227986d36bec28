"""Cosine of MiniLM's sentence embeddings to those of the float32 model, on real sentences.

    python -m benchmarks.minilm_fidelity           # 512 sentences, every recipe and peer
    python -m benchmarks.minilm_fidelity --quick   # 64 sentences

The sentences are first sentences of the standard library's docstrings; calibration uses others of
them. Embeddings are the mean over the tokens that are not padding, normalised. Every tool sees the
same batches of one fixed shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness, peers, workloads
from benchmarks.sentences import sentences
from benchmarks.workloads import Inputs

BATCH, LENGTH = 16, 64
CALIBRATION_BATCHES = 45  # 720 sentences: error-compensated rounding wants some 10 000 tokens
Run = Callable[[Inputs], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """The model with its sentences as batches; ``workload`` has what the toolchains need."""

    workload: workloads.Workload
    batches: tuple[Inputs, ...]
    folder: Path

    @property
    def source(self) -> Path:
        """The float32 export."""
        return self.folder / "fp32.onnx"


def load(count: int, folder: Path, length: int = LENGTH) -> Task:
    """MiniLM and ``count`` sentences for evaluation, other ones for calibration.

    length: tokens of each sentence, padded or cut.
    """
    model, tokenizer = workloads.load_minilm()
    held_out = BATCH * CALIBRATION_BATCHES
    pool = sentences(held_out + count)
    tokens = [workloads.tokenize(tokenizer, texts, length) for texts in peers.batches(pool, BATCH)]
    calibration = tuple(tokens[:CALIBRATION_BATCHES])
    workload = workloads.Workload(name="minilm", model=model, inputs=calibration[0],
                                  calibration=calibration, linears=36)
    return Task(workload, tuple(tokens[CALIBRATION_BATCHES:]), folder)


def embeddings(run: Run, batches: Sequence[Inputs]) -> torch.Tensor:
    """Sentence embeddings [sentences, width] in float64: masked mean, normalised."""
    return torch.cat([pool(run(batch), batch[1]) for batch in batches])


def pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, T, D] and mask [B, T] → unit vectors [B, D]."""
    weights = mask.double().unsqueeze(-1)
    mean = (hidden.double() * weights).sum(1) / weights.sum(1)
    return nn.functional.normalize(mean, dim=-1)


def fidelity(actual: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Mean, 5th percentile and least cosine of two sets of unit vectors."""
    cosine = (actual * expected).sum(-1).numpy()
    return {"mean": float(cosine.mean()), "p5": float(np.percentile(cosine, 5)),
            "min": float(cosine.min())}


# ------------------------------------------------------------------ rows


def peer_rows(task: Task) -> dict[str, Callable[[], tuple[Run, int | None]]]:
    """Row name → builder of a run and the bytes of its file."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    rows: dict[str, Callable[[], tuple[Run, int | None]]] = {
        name: lambda build=build, name=name: onnx_run(build(task.folder / f"{name}.onnx"))
        for name, build in peers.onnx_peers(task.workload, task.source).items()
    }
    configs = {
        "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig(),
        "torchao int8 weight": Int8WeightOnlyConfig(),
        **{f"torchao int4 weight g{group}": IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(group)) for group in (32, 128)},
        "torchao int8 dynamic, int4 weight g32": Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
    }
    rows |= {name: lambda config=config: module_run(
        peers.torchao_quantized(task.workload.model, config)) for name, config in configs.items()}
    return rows | {
        f"torchao PT2E {kind}": lambda kind=kind: module_run(pt2e(task, kind == "dynamic"))
        for kind in ("static", "dynamic")}


def pt2e(task: Task, dynamic: bool) -> nn.Module:
    """torchao's PT2E module for this task."""
    with peers.quiet():
        return peers.pt2e_module(task.workload.model, task.workload.inputs,
                                 task.workload.calibration, dynamic)


def our_rows(task: Task) -> dict[str, Callable[[], tuple[Run, int | None]]]:
    """The same for every recipe of scaleprop, run from its ONNX file by a plain session."""
    from scaleprop.recipes import named_recipes

    return {f"ours {recipe}": lambda recipe=recipe: onnx_run(
        peers.ours_onnx(task.workload, recipe, task.folder / f"ours-{recipe}.onnx"))
        for recipe in (known.name for known in named_recipes())}


def onnx_run(path: Path) -> tuple[Run, int]:
    """Run a file on ORT."""
    running = peers.session(path, torch.get_num_threads())
    return (lambda batch: torch.as_tensor(peers.ort_call(running, batch)()[0]),
            peers.file_bytes(path))


def module_run(module: nn.Module) -> tuple[Run, None]:
    """Run a torch module, eagerly: the toolchain's own arithmetic without a compiler's."""
    return lambda batch: module(*batch), None


# ------------------------------------------------------------------ table and command line


def table(results: harness.Results) -> str:
    """The Markdown table."""
    fp32 = results.data["fp32_bytes"]
    body = []
    for name, row in results.sections.items():
        if "error" in row:
            body.append([name, row["error"]])
            continue
        size = f"{row['bytes'] / fp32:.3f}" if row["bytes"] else None
        body.append([name, f"{row['mean']:.5f}", f"{row['p5']:.5f}", f"{row['min']:.5f}", size])
    return "\n".join([
        "# MiniLM: cosine of sentence embeddings to float32", "",
        f"Machine: {harness.machine_line(results.data['machine'])}", "",
        f"{results.data['sentences']} sentences from the standard library's docstrings, batches of "
        f"{BATCH}×{LENGTH} tokens. Size is the ONNX file's, relative to the float32 export "
        f"({fp32 / 2**20:.1f} MiB).", "",
        harness.markdown_table(["row", "mean", "5th percentile", "least", "size ratio"], body),
    ])


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the rows that the results file lacks."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 sentences")
    parser.add_argument("--only", help="comma-separated row names")
    parser.add_argument("--redo", action="store_true", help="evaluate again what is there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    count = 64 if options.quick else 512
    results = harness.Results("minilm_fidelity_quick" if options.quick else "minilm_fidelity",
                              options.results)
    with tempfile.TemporaryDirectory() as folder:
        task = load(count, Path(folder))
        model = task.workload.model
        expected = embeddings(lambda batch: model(*batch), task.batches)
        peers.export_fp32(model, task.workload.inputs, task.source)
        results.data |= {"sentences": len(expected), "fp32_bytes": peers.file_bytes(task.source)}
        rows = {"ORT fp32": lambda: onnx_run(task.source), **our_rows(task), **peer_rows(task)}
        for name, build in rows.items():
            skip = name in results.sections and "error" not in results.sections[name]
            if (options.only and name not in options.only.split(",")) or (
                    skip and not options.redo):
                continue
            results.add(name, evaluate(build, task, expected))
            results.write_markdown(table(results))
            print(name, results.sections[name], flush=True)
    results.write_markdown(table(results))
    print(f"wrote {results.json_path} and {results.markdown_path}")
    return 0


def evaluate(build: Callable[[], tuple[Run, int | None]], task: Task,
             expected: torch.Tensor) -> dict[str, Any]:
    """One row: figures, or the error of a toolchain that failed."""
    started = time.perf_counter()
    try:
        run, size = build()
        figures = fidelity(embeddings(run, task.batches), expected)
    except Exception as error:  # noqa: BLE001 - any failure of a tool is a finding, shown
        return {"error": harness.error_text(error)}
    return {**figures, "bytes": size, "seconds": round(time.perf_counter() - started, 1)}


if __name__ == "__main__":
    sys.exit(main())
