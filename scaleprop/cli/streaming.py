"""``scaleprop compile --from-safetensors``: a model that need not fit into memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaleprop.cli.models import call, resolve
from scaleprop.errors import ConfigError
from scaleprop.report import Report


def compile_from_files(
    source: Path, out: Path | None, kind: str | None, *, model: str | None, inputs: str | None,
    recipes: Sequence[str], target: str | None, verify: bool, ignore: Sequence[str],
    seconds: float, loss: str | None, measure: bool, **options: Any,
) -> Report:
    """``scaleprop.compile_from_safetensors`` on what the arguments name.

    Raises:
        ConfigError: for arguments that make no sense with it.
    """
    from scaleprop.streaming import compile_from_safetensors

    del seconds, measure  # nothing is timed, and nothing run
    if kind not in (None, "scaleprop"):
        raise ConfigError(f"--format {kind} has no use with --from-safetensors, which writes a "
                          "folder for scaleprop.load. Remedy: leave it out")
    if len(recipes) > 1 or loss is not None:
        what = "several recipes" if loss is None else "--loss"
        raise ConfigError(f"{what} with --from-safetensors: the model is written by one recipe, "
                          "and never run as a whole. Remedy: leave it out")
    if out is None or out.suffix == ".onnx":
        raise ConfigError("--from-safetensors writes what scaleprop.load reads: pass --out FOLDER")
    if target is not None or verify:
        raise ConfigError(f"{'--target' if target else '--verify'} needs the whole model in "
                          "memory, --from-safetensors never has it. Remedy: leave it out")
    if model is not None and model.endswith(".pt2"):
        raise ConfigError(f"{model!r} holds a whole model. Remedy: package.module:factory")
    return compile_from_safetensors(
        source, out, None if inputs is None else call(inputs, "inputs"),
        recipe=recipes[0], model=None if model is None else resolve(model, "model"), ignore=ignore,
        progress=sys.stderr.isatty(), **options)
