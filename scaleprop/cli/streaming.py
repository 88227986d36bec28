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
    source: Path, out: Path | None, *, model: str | None, inputs: str | None, target: str | None,
    verify: bool, ignore: Sequence[str], **options: Any,
) -> Report:
    """``scaleprop.compile_from_safetensors`` on what the arguments name.

    Raises:
        ConfigError: for arguments that make no sense with it.
    """
    from scaleprop.streaming import compile_from_safetensors

    if out is None or out.suffix == ".onnx":
        raise ConfigError("--from-safetensors writes what scaleprop.load reads: pass --out FOLDER")
    if target is not None or verify:
        raise ConfigError(f"{'--target' if target else '--verify'} needs the whole model in "
                          "memory, --from-safetensors never has it. Remedy: leave it out")
    if model is not None and model.endswith(".pt2"):
        raise ConfigError(f"{model!r} holds a whole model. Remedy: package.module:factory")
    return compile_from_safetensors(
        source, out, None if inputs is None else call(inputs, "inputs"),
        model=None if model is None else resolve(model, "model"), ignore=ignore,
        progress=sys.stderr.isatty(), **options)
