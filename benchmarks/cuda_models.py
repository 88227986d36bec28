"""Whole models compiled for a CUDA device, in multiples of ``torch.compile`` in BF16.

    python -m benchmarks.cuda_models [--only minilm] [--smoke]

``scaleprop.compile(model, inputs, recipe=…, backend="cuda")`` of MiniLM on 32 texts of 128 tokens,
and of a Llama of about a billion random parameters on 2048 tokens (prefill) and on one (a step of
decoding, without its cache). Sizes are dynamic, as compiled by default; the BF16 models are
compiled for each size by itself. "replayed": both from a CUDA graph, so that no launch is counted.
Cosine: of the results to those of ``backend="reference"``, which computes the same program exactly.
One code that falls the other way moves all that follow: the error to the reference, 1 − cosine, is
held against the error that the reference has to the model as it was.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

import scaleprop
from benchmarks import harness
from benchmarks.cuda_harness import Row, Script, main
from benchmarks.cuda_linear import billion
from benchmarks.cuda_timing import Bench, Call, Compiled, Skip, compiling
from benchmarks.workloads import HiddenStates, Inputs, Logits

RECIPES = {"INT8": "int8-token", "FP8": "fp8", "MXFP8": "mxfp8", "INT4": "int4"}
HELD = ("INT8", "FP8")  # to FASTER
FASTER, LEAST = 1.0, 0.99
BF16, COSINE = "× BF16", "cosine to the reference"
OWN = "quantization's own error ÷ error to the reference"
PREFILL = 2048
_COMPARED = 128  # tokens: the reference multiplies in float64


@dataclasses.dataclass(frozen=True)
class Task:
    """A model in bfloat16, and what it is run on: by name, timed; and compared."""

    model: nn.Module
    timed: dict[str, Inputs]
    compared: Inputs


def rows(small: bool) -> list[Row]:
    """Every recipe of every model; what must be shown first."""
    del small
    models = {"MiniLM": (minilm, ("",)), "Llama": (llama, (", prefill", ", decode"))}
    found: list[Row] = []
    for name, recipe in RECIPES.items():
        for model, (build, kinds) in models.items():
            bounds = {f"{BF16}{kind}": FASTER for kind in kinds if name in HELD}
            found.append(Row(
                name=f"{model}, {name}", bounds=bounds | {COSINE: LEAST, OWN: 1.0}, seconds=120,
                run=lambda bench, build=build, recipe=recipe: measure(bench, build, recipe)))
    return found


def minilm(bench: Bench) -> Task:
    """With its released weights.

    Raises:
        Skip: where they are not installed.
    """
    import transformers

    batch, length = (2, 16) if bench.small else (32, 128)
    if bench.small:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "vocab_size": 128}
        model: nn.Module = HiddenStates(transformers.BertModel(
            transformers.BertConfig(**sizes), add_pooling_layer=False))
    else:
        try:
            from benchmarks.workloads import load_minilm

            model = load_minilm()[0]
        except ImportError as error:
            raise Skip(f"MiniLM: {error}") from error
    ids = torch.randint(100, 120 if bench.small else 30000, (batch, length), device=bench.device)
    inputs = ids, torch.ones_like(ids)
    return Task(model.to(bench.device, torch.bfloat16).eval(), {"": inputs}, inputs)


def llama(bench: Bench) -> Task:
    with torch.device(bench.device):
        model = Logits(billion(bench.small)).eval()
    ids = torch.randint(128 if bench.small else 32000, (1, 16 if bench.small else PREFILL),
                        device=bench.device)
    return Task(model, {", prefill": (ids,), ", decode": (ids[:, :1],)}, (ids[:, :_COMPARED],))


def measure(bench: Bench, build: Callable[[Bench], Task], recipe: str) -> dict[str, Any]:
    """One model by one recipe."""
    with torch.no_grad():
        task = build(bench)
        if bench.compile_only:
            with compiling():
                ours, _ = compiled(task, recipe)
                for inputs in task.timed.values():
                    ours(*inputs)
            raise Compiled
        return _measured(bench, task, recipe)


def _measured(bench: Bench, task: Task, recipe: str) -> dict[str, Any]:
    ours, where = compiled(task, recipe)
    figures: dict[str, list[float] | None] = {}
    seconds: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for kind, inputs in task.timed.items():
        plain = task.model if bench.small else torch.compile(task.model, fullgraph=True,
                                                             dynamic=False)
        names = ["ours", "BF16", *(() if bench.small else ("ours, replayed", "BF16, replayed"))]
        calls = {"ours": ours, "BF16": plain}

        def calling(name: str, inputs: Inputs = inputs, calls: Any = calls) -> Call:
            run = calls[name.split(",")[0]]
            once = lambda: run(*inputs)  # noqa: E731
            return bench.graph(once) if "," in name else once

        found = bench.compare({name: lambda name=name: calling(name) for name in names},
                              names[2:], cold=False, held=False)
        figures[f"{BF16}{kind}"] = found.faster("ours", "BF16")
        if "ours, replayed" in found.seconds:
            figures[f"{BF16}, replayed{kind}"] = found.faster("ours, replayed", "BF16, replayed")
        row = found.result({})
        seconds |= {f"{name}{kind}": value for name, value in row["seconds"].items()}
        refused |= {f"{name}{kind}": value for name, value in row["refused"].items()}
    near, own = cosines(ours, task)
    figures[COSINE] = [near] * 3
    figures[OWN] = [min((1 - own) / max(1 - near, 1e-12), 1e6)] * 3
    kinds = {str(each.lowering) for each in ours.report.records if each.lowering}
    return {"figures": {name: value for name, value in figures.items() if value is not None},
            "seconds": seconds, "refused": refused, "captured on": where,
            "lowerings": sorted(kinds)}


def compiled(task: Task, recipe: str) -> tuple[Any, str]:
    """The compiled model, captured where it is, else on the CPU; and where that was."""
    try:
        return scaleprop.compile(task.model, task.compared, recipe=recipe, backend="cuda"), "device"
    except Exception as error:  # noqa: BLE001  the row says which it was
        why = harness.error_text(error, 300)
    device = task.compared[0].device
    inputs = tuple(each.cpu() for each in task.compared)
    try:
        found = scaleprop.compile(task.model.cpu(), inputs, recipe=recipe, backend="cuda")
    finally:
        task.model.to(device)
    return found, f"CPU; on the device {why}"


def cosines(ours: Any, task: Task) -> tuple[float, float]:
    """Of our results to the reference's, of the reference's to the model's as it was; the
    reference runs where the program's constants are."""
    from scaleprop.backends.registry import backend_named

    reference = backend_named("reference").lower(ours.program)
    place = next((each.device for each in ours.program.module.state_dict().values()),
                 torch.device("cpu"))
    inputs = tuple(each.to(place) for each in task.compared)
    (want,) = (each for each in reference(ours.signature.flatten(inputs, {}))
               if isinstance(each, Tensor))
    flat = [each.to(place).double().flatten() for each in (
        ours(*task.compared), want, task.model(*task.compared))]  # fmt: skip
    near, own = (float(nn.functional.cosine_similarity(flat[1], each, dim=0))
                 for each in (flat[0], flat[2]))
    return near, own


SCRIPT = Script(name="cuda_models", doc=__doc__ or "", rows=rows, rounds=15)


if __name__ == "__main__":
    sys.exit(main(SCRIPT))
