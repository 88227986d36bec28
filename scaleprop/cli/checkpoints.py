"""Checkpoints on the command line: folders of transformers, in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scaleprop.api import CompiledModel, from_pretrained
from scaleprop.cli.models import Subject, is_checkpoint, load_subject
from scaleprop.errors import ConfigError


def is_quantized(spec: str) -> bool:
    """Whether this is a folder whose weights are in codes.

    Raises:
        ConfigError: where its ``config.json`` is damaged.
    """
    if not is_checkpoint(spec):
        return False
    try:
        config = json.loads((Path(spec) / "config.json").read_text())
    except (OSError, ValueError) as error:
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
        flag = {"passes": "pass"}.get(refused[0], refused[0])
        raise ConfigError(f"{spec!r} is quantized already, and is taken as it is: leave out "
                          f"--{flag}")
    subject = load_subject(spec, inputs)
    return subject, from_pretrained(spec, subject.inputs, backend, verify=verify)


def write(compiled: CompiledModel, out: Path, kind: str | None, subject: Subject) -> Path:
    """Write ``compiled`` as ``kind``, or as what the name says.

    Raises:
        ConfigError: where ``kind`` contradicts the name, or the model is none of transformers.
    """
    if kind == "compressed-tensors":
        if not isinstance(subject.model, torch.nn.Module):
            raise ConfigError("--format compressed-tensors: the model is an exported program; give "
                              "the transformers model that it was made of")
        return compiled.save_pretrained(out, subject.model)
    is_onnx = out.suffix == ".onnx"
    if kind is not None and is_onnx != (kind == "onnx"):
        raise ConfigError(f"--format {kind}: {str(out)!r} is named "
                          f"{'as' if is_onnx else 'otherwise than'} an ONNX file")
    return compiled.export(out) if is_onnx else compiled.save(out)
