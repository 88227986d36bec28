"""Solved weights on disk, one file each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.formats import ScaledFormat, ScaledTensor

VERSION = 1


def fingerprint(matrix: torch.Tensor, fmt: ScaledFormat, options: str, moment: torch.Tensor) -> str:
    """SHA-256 over all that a solved weight follows from, to the last bit."""
    digest = hashlib.sha256(f"{VERSION};{fmt.long_name};{options}".encode())
    for tensor in (matrix, moment):
        digest.update(f";{tensor.dtype}{list(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Store:
    """A directory of solved weights. ``loaded``, ``stale``: how many were used, how many not."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self.loaded = 0
        self.stale = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"resume={directory!r}: {error}") from error

    def load(
        self, name: str, mark: str, matrix: torch.Tensor, fmt: ScaledFormat
    ) -> ScaledTensor | None:
        """What was solved earlier for the weight ``name``; None if nothing, or for other data.

        Raises:
            ConfigError: a file that cannot be read.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with _safetensors("safetensors").safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != mark:
                    self.stale += 1
                    return None
                parts = [file.get_tensor(f"part{index}") for index in range(fmt.parts_count)]
        except (OSError, _safetensors("safetensors").SafetensorError) as error:
            raise ConfigError(
                f"{path} cannot be read: {error}. Remedy: delete it; its weight is solved again"
            ) from error
        self.loaded += 1
        parts = [part.to(matrix.device) for part in parts]
        return ScaledTensor.from_parts(parts, fmt, matrix.shape, dtype=matrix.dtype)

    def save(self, name: str, mark: str, solved: ScaledTensor) -> None:
        """Write under a temporary name, then rename: a file is whole or not there."""
        parts = {f"part{i}": part.cpu().contiguous() for i, part in enumerate(solved.parts)}
        handle, scratch = tempfile.mkstemp(dir=self._directory, suffix=".part")
        os.close(handle)
        try:
            write = _safetensors("safetensors.torch").save_file
            write(parts, scratch, metadata={"fingerprint": mark, "format": str(solved.format)})
            os.replace(scratch, self._path(name))
        finally:
            Path(scratch).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        short = hashlib.sha256(name.encode()).hexdigest()[:8]
        readable = re.sub(r"[^\w.-]", "_", name)[-100:]
        return self._directory / f"{readable}-{short}.safetensors"


def _safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"solve-weights{{resume=…}} needs safetensors: {install_command('safetensors')}"
        ) from error
