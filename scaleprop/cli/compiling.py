"""``scaleprop compile``: one recipe, or several side by side; in memory, or from files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaleprop.analysis import analyze
from scaleprop.analysis.recipes import compare_recipes
from scaleprop.api import compile
from scaleprop.cli.checkpoints import check_output, compile_checkpoint, is_quantized, write
from scaleprop.cli.models import Subject, load_subject, resolve
from scaleprop.cli.streaming import compile_from_files
from scaleprop.errors import ConfigError
from scaleprop.report import Report


def compile_and_report(
    *, source: Path | None, model: str | None, ignore: Sequence[str], given: Sequence[str],
    out: Path | None, kind: str | None, **options: Any,
) -> tuple[Report, list[Path]]:
    """The report and the files written; measured, where ``measure`` is among the options, while
    the model that was given is there to compare with.

    given: the options that the user gave.

    Raises:
        ConfigError: for options that contradict each other; and as ``compile`` and ``analyze``.
    """
    if source is not None:
        found = compile_from_files(source, out, kind, model=model, ignore=ignore, **options)
        return found, [] if out is None else [out]
    if ignore:
        raise ConfigError("--ignore goes with --from-safetensors. Remedy: leave it out")
    if model is None:
        raise ConfigError("MODEL is missing. Remedy: name it, or pass --from-safetensors DIR")
    check_output(model, out, kind)
    if is_quantized(model):
        measure = options.pop("measure")
        subject, compiled = compile_checkpoint(model, given, **options)
        report = compiled.report.measured() if measure else compiled.report
        return report, [] if out is None else [write(compiled, out, kind, subject)]
    return _compiled(model, out, kind, **options)


def _compiled(
    model: str, out: Path | None, kind: str | None, *, inputs: str | None, recipes: Sequence[str],
    target: str | None, seconds: float, loss: str | None, measure: bool, **options: Any,
) -> tuple[Report, list[Path]]:
    several = len(recipes) > 1
    if several and (out is not None or target is not None):
        raise ConfigError("several recipes are compared, and none is kept: drop "
                          f"{'--out' if out is not None else '--target'}, or name one --recipe")
    loss_fn: Any = resolve(loss, "loss") if loss not in (None, "output") else loss
    subject: Subject = load_subject(model, inputs)
    options["progress"] = sys.stderr.isatty()
    files: list[Path] = []
    if several:
        report, _ = compare_recipes(
            subject.model, subject.inputs, recipes, seconds=seconds, **options)
    else:
        compiled = compile(subject.model, subject.inputs, recipes[0], target=target, **options)
        report = compiled.report.measured() if measure else compiled.report
        files = [] if out is None else [write(compiled, out, kind, subject)]
    if loss_fn is not None:
        step: Any = subject.model
        report = report.with_scales(analyze(step, subject.inputs, loss_fn=loss_fn))
    return report.measured() if measure else report, files
