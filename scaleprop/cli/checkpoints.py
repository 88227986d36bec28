"""Checkpoints on the command line: folders of transformers, in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scaleprop.api import CompiledModel, from_pretrained
from scaleprop.cli.models import Subject, is_checkpoint, load_subject
from scaleprop.errors import ConfigError

if TYPE_CHECKING:
    import torch

COMPRESSED_TENSORS = "compressed-tensors"

def is_quantized(spec: str) -> bool:
    """Whether this is a folder whose weights are in codes.

    Raises:
        ConfigError: where its ``config.json`` is damaged.
    """
    if not is_checkpoint(spec):
        return False
    try:
        config = json.loads((Path(spec) / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{spec!r} is no checkpoint of transformers: {error}") from error
    return isinstance(config, dict) and "quantization_config" in config


def compile_checkpoint(
    spec: str, given: Sequence[str], *, inputs: str | None, backend: str, verify: bool,
    **options: Any,
) -> tuple[Subject, CompiledModel]:
    """The decoded model with its inputs, and the graph of its codes.

    given: the options that the user gave.

    Raises:
        ConfigError: where one of them says how to quantize.
    """
    if refused := sorted(set(given) & set(options)):
        flag = {"passes": "pass", "recipes": "recipe"}.get(refused[0], refused[0])
        raise ConfigError(f"{spec!r} is quantized already, and is taken as it is: leave out "
                          f"--{flag}")
    subject = load_subject(spec, inputs)
    return subject, from_pretrained(spec, subject.inputs, backend, verify=verify)


def check_output(model: str, out: Path | None, kind: str | None) -> None:
    """Refuse before minutes of work what would be refused after them.

    Raises:
        ConfigError: where ``kind`` contradicts the name, or fits no such model.
    """
    if kind is None:
        return
    if out is None:
        raise ConfigError(f"--format {kind}: say where to, with --out")
    is_onnx = out.suffix == ".onnx"
    if is_onnx != (kind == "onnx"):
        raise ConfigError(f"--format {kind}: {str(out)!r} is named "
                          f"{'as' if is_onnx else 'otherwise than'} an ONNX file")
    if kind == COMPRESSED_TENSORS and model.endswith(".pt2"):
        raise ConfigError(f"--format {kind}: {model!r} is an exported program; give the model of "
                          "transformers that it was made of")


def write(compiled: CompiledModel, out: Path, kind: str | None, subject: Subject) -> Path:
    """Write ``compiled`` as ``kind``, or as what the name says."""
    if kind == COMPRESSED_TENSORS:
        return compiled.save_pretrained(out, cast("torch.nn.Module", subject.model))
    return compiled.export(out) if out.suffix == ".onnx" else compiled.save(out)
