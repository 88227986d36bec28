"""What each method of post-training quantization keeps, by format, with and without outliers.

    python -m benchmarks.post_training                      # every model, format and method
    python -m benchmarks.post_training --models lm --formats W4A4 --methods nearest,rotation
    python -m benchmarks.post_training --quick              # few sentences and windows

Models: MiniLM with its released weights, mean cosine of the embeddings of 512 sentences to those
in float32; a small Llama trained on the standard library's source (``examples.train_lm``), on text
that it never saw: perplexity, and how far its predictions moved from float32's (Kullback-Leibler
divergence), which is the less noisy of the two. Each also with outliers in 1 % of its channels
(``benchmarks.outliers``), which change nothing in float32. Calibration data are never evaluated.
Embeddings stay in float32, as the peers leave them (``benchmarks.post_training_peers``).
Cells are kept in ``benchmarks/results/post_training.json`` as they come; ``--redo`` measures again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scaleprop
from benchmarks import harness, minilm_fidelity, outliers, workloads
from examples import language_model
from scaleprop.errors import ScalePropError
from scaleprop.recipes import Recipe, named_recipe

RESULTS = harness.RESULTS / "post_training.json"
SENTENCES, WINDOWS, CALIBRATION = 512, 16, 16  # of each: batches for windows and calibration
LENGTH = 32  # tokens of a sentence, padded or cut

FORMATS: Mapping[str, str] = {
    "W8A8": "int8-token",
    "W4A8": "int4-int8-token",
    "W4A4": "int4-int4",
    "W4A4 static": "int4-int4-static",
    "W4": "int4",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}
METHODS: Mapping[str, tuple[str, ...]] = {
    "nearest": (),
    "SmoothQuant": ("smooth",),
    "OS+": ("os-plus",),
    "AWQ": ("awq",),
    "rotation": ("fold-norms", "rotate"),
    "smooth + rotate": ("smooth-rotate",),
    "RRS": ("fold-norms", "rotate", "runtime-smooth"),
    "MergeQuant": ("merge-quant",),
    "reordering": ("reorder",),
    "GPTQ": ("solve-weights",),
    "GPTQ + rotation": ("fold-norms", "rotate", "solve-weights"),
    "auto": ("auto",),
}
DYNAMIC_ONLY, STATIC_ONLY = ("RRS",), ("MergeQuant",)
# An order of the channels changes nothing where they share a scale.
BLOCKS_ONLY, SHARED = ("reordering",), ("W8A8", "W4A4", "W4A4 static")


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with what it is judged by.

    measure: a run of the model → its figure, ``value``; of a language model its ``divergence`` from
    float32 too, in nats a token.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    calibration: list[tuple[Tensor, ...]]
    measure: Callable[[Callable[..., Any]], dict[str, float]]


# ------------------------------------------------------------------ models


def minilm(count: int, injected: bool, folder: Path) -> Task:
    """Mean cosine of sentence embeddings to float32."""
    task = minilm_fidelity.load(count, folder, LENGTH)
    model = task.workload.model
    with torch.no_grad():
        expected = minilm_fidelity.embeddings(_plain(model), task.batches)
        if injected:
            outliers.into_bert(next(model.children()))

    def measure(run: Callable[..., Any]) -> dict[str, float]:
        actual = minilm_fidelity.embeddings(_plain(run), task.batches)
        return {"value": minilm_fidelity.fidelity(actual, expected)["mean"]}

    return Task(model, task.workload.inputs, list(task.workload.calibration[:CALIBRATION]), measure)


def _plain(run: Callable[..., Any]) -> Callable[[workloads.Inputs], Tensor]:
    def call(batch: workloads.Inputs) -> Tensor:
        found = run(*batch)
        return found if isinstance(found, Tensor) else found[0]

    return call


class _Logits(nn.Module):
    """A language model that returns nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def language(windows: int, injected: bool, folder: Path) -> Task:
    """Perplexity of the small Llama on held-out text; trained once, and kept in ``folder``."""
    settings = language_model.Settings()
    text = language_model.tokens(settings.vocabulary)
    training, held_out = language_model.split(text)
    model = trained(folder / "lm.pt", training, settings)
    if injected:
        outliers.into_llama(model)
    draws = language_model.batches(held_out, 0, settings)
    evaluation = [next(draws) for _ in range(windows)]
    calls = language_model.batches(training, 1, settings)
    calibration = [(next(calls)[:, :-1],) for _ in range(CALIBRATION)]

    task = _Logits(model).eval()
    with torch.no_grad():
        expected = [_predictions(task, ids) for ids in evaluation]

    def measure(run: Callable[..., Any]) -> dict[str, float]:
        losses, distances = [], []
        for ids, exact in zip(evaluation, expected, strict=True):
            found = _predictions(run, ids)
            losses.append(nn.functional.nll_loss(found, ids[:, 1:].flatten()))
            distances.append(nn.functional.kl_div(found, exact, reduction="batchmean",
                                                  log_target=True))
        return {"value": math.exp(float(torch.stack(losses).mean())),
                "divergence": float(torch.stack(distances).mean())}

    return Task(task, calibration[0], calibration, measure)


def _predictions(run: Callable[..., Any], ids: Tensor) -> Tensor:
    """Log-probabilities [tokens, vocabulary] of the next token, all along a window."""
    return run(ids[:, :-1]).float().flatten(0, 1).log_softmax(-1)


def trained(path: Path, text: Tensor, settings: language_model.Settings) -> nn.Module:
    """The weights in ``path``; trained and written where there are none."""
    torch.manual_seed(0)
    model = language_model.Language(settings)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.rate,
                                  weight_decay=language_model.DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.rate,
                                                   total_steps=settings.steps)
    drawn = language_model.batches(text, 0, settings)
    for _, ids in zip(range(settings.steps), drawn, strict=False):
        optimizer.zero_grad()
        model(ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), language_model.CLIP)
        optimizer.step()
        schedule.step()
    torch.save(model.state_dict(), path)
    return model.model


MODELS: Mapping[str, Callable[[bool, Path], Task]] = {
    "minilm": lambda quick, folder: minilm(32 if quick else SENTENCES, False, folder),
    "minilm+outliers": lambda quick, folder: minilm(32 if quick else SENTENCES, True, folder),
    "lm": lambda quick, folder: language(2 if quick else WINDOWS, False, folder),
    "lm+outliers": lambda quick, folder: language(2 if quick else WINDOWS, True, folder),
}


# ------------------------------------------------------------------ cells


def fits(method: str, fmt: str) -> bool:
    """Whether a method means something for a format."""
    static = fmt.endswith("static")
    weights_only = fmt == "W4"
    if method in STATIC_ONLY:
        return static
    if method in DYNAMIC_ONLY:
        return not static and not weights_only
    return method not in BLOCKS_ONLY or fmt not in SHARED


def plan(fmt: str) -> Recipe:
    """The recipe of a format, embeddings left out."""
    found = named_recipe(FORMATS[fmt])
    roles = {site: role for site, role in found.roles.items() if site != "embedding"}
    return dataclasses.replace(found, roles=roles)


def cell(task: Task, fmt: str, method: str) -> dict[str, Any]:
    """One method in one format: its figure, and seconds to compile."""
    began = time.perf_counter()
    try:
        compiled = scaleprop.compile(
            copy.deepcopy(task.model), task.example, recipe=plan(fmt), backend="reference",
            calibration=task.calibration, passes=METHODS[method])  # fmt: skip
    except ScalePropError as error:
        return {"refused": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    seconds = time.perf_counter() - began
    with torch.no_grad():
        figures = task.measure(compiled)
    trials = [dataclasses.asdict(trial) for trial in compiled.program.trials]
    return {**figures, "seconds": seconds, **({"trials": trials} if trials else {})}


def tables(model: str, cells: Mapping[str, Any]) -> str:
    """One model's methods by formats, as Markdown."""
    plain = cells[f"{model}|float32"]["value"]
    if model.startswith("minilm"):
        return table(model, cells, f"mean cosine (float32: {plain:.4f})", "value", 1)
    return "\n\n".join([
        table(model, cells, f"perplexity (float32: {plain:.4f})", "value", 1),
        table(model, cells, "divergence from float32, 10⁻³ nats a token", "divergence", 1e3)])


def table(
    model: str, cells: Mapping[str, Any], heading: str, figure: str, factor: float
) -> str:  # fmt: skip
    """One figure of every cell of a model, times ``factor``."""
    formats = [fmt for fmt in FORMATS if any(key.split("|")[:2] == [model, fmt] for key in cells)]
    rows = [f"### {model}: {heading}", "",
            "| method | " + " | ".join(formats) + " |", "| --- " * (len(formats) + 1) + "|"]
    names = dict.fromkeys([*METHODS, *(key.split("|")[2] for key in cells if key.count("|") == 2)])
    for method in names:
        found = [cells.get(f"{model}|{fmt}|{method}") for fmt in formats]
        if any(found):
            shown = [_text(each, figure, factor) for each in found]
            rows.append(f"| {method} | " + " | ".join(shown) + " |")
    times = [cells.get(f"{model}|{fmt}|auto", {}).get("seconds") for fmt in formats]
    if any(times) and figure == "value":
        rows.append("| *seconds of auto, one thread* | " + " | ".join(
            "" if time is None else f"{time:.0f}" for time in times) + " |")
    for key, found in cells.items():
        if key.startswith(f"{model}|float32|"):
            name = key.split("|")[2]
            rows += ["", f"{name}, nothing quantized: {_text(found, figure, factor)}"]
    return "\n".join(rows)


def _text(found: Mapping[str, Any] | None, figure: str, factor: float) -> str:
    if found is None:
        return ""
    return "refused" if "refused" in found else f"{found[figure] * factor:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--folder", type=Path, default=harness.ROOT / "demo")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--redo", action="store_true")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.models.split(","):
        task = MODELS[name](options.quick, options.folder)
        with torch.no_grad():
            keep(options.results, f"{name}|float32", task.measure(task.model))
        for fmt in options.formats.split(","):
            for method in options.methods.split(","):
                key = f"{name}|{fmt}|{method}"
                if not fits(method, fmt) or (not options.redo and key in read(options.results)):
                    continue
                found = cell(task, fmt, method)
                print(key, found.get("value", found.get("refused")), flush=True)
                keep(options.results, key, found)
    cells = read(options.results)
    known = [model for model in MODELS if f"{model}|float32" in cells]
    text = "\n\n".join(tables(model, cells) for model in known)
    options.results.with_suffix(".md").write_text(
        f"# Post-training quantization: what each method keeps\n\n{text}\n")
    print(text)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def keep(path: Path, key: str, found: dict[str, Any]) -> None:
    """Read anew and replaced in one step: several processes may measure side by side."""
    cells = read(path)
    cells[key] = found
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(dict(sorted(cells.items())), indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
