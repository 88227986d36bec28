"""A saved model's files: shards first, the manifest last; finished shards are not written again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scaleprop import durable
from scaleprop.storage import tensorfile

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
EXAMPLES = "example.safetensors"
_PART = ".part"  # of a file that is being written

Tensors = Mapping[str, torch.Tensor]


def shards(tensors: Tensors, limit: int) -> dict[str, Tensors]:
    """File name → its tensors, in the order given: at most ``limit`` bytes, or one tensor."""
    found: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.dtype.itemsize
        if found[-1] and size + nbytes > limit:
            found.append({})
            size = 0
        found[-1][name] = tensor
        size += nbytes
    return {f"tensors-{index:05}.safetensors": shard for index, shard in enumerate(found, 1)}


def fill(
    folder: Path, format_version: int, texts: Mapping[str, str], files: Mapping[str, Tensors]
) -> None:
    """Write ``texts``, ``files`` and their manifest to ``folder``, where a killed ``fill`` may have
    left some of them, or ``durable.install`` some of an older model."""
    durable.empty(folder, but=files)
    manifest: dict[str, Any] = {"format_version": format_version, "files": {}, "tensors": {}}
    for name, tensors in files.items():
        digests = _finished(folder / name, tensors)
        if digests is None:
            part = folder / f"{name}{_PART}"
            digests = tensorfile.write(part, tensors)
            durable.replace(part, folder / name)
        else:
            logger.info("%s is complete already", name)
        manifest["tensors"][name] = {"header": _sha256(tensorfile.header(tensors)),
                                     "tensors": digests}
    for name, text in texts.items():
        manifest["files"][name] = _sha256(text.encode())
        _write(folder / name, text)
    _write(folder / MANIFEST, json.dumps(manifest, indent=1))


def _finished(path: Path, tensors: Tensors) -> dict[str, str] | None:
    """The digests of ``tensors``, where ``path`` holds them, bit for bit; else None."""
    header = tensorfile.header(tensors)
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header:
                return None
    except FileNotFoundError:
        return None
    if path.stat().st_size != len(header) + sum(
            tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values()):
        return None
    there = tensorfile.stored(path)
    digests: dict[str, str] = {}
    for name in tensorfile.ordered(tensors):
        digests[name] = tensorfile.digest_of(tensors[name])
        if tensorfile.digest_of(there[name]) != digests[name]:
            return None
    return digests


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
