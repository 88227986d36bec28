"""A folder of what parameters became, one file each, that a killed compilation finds again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import scaleprop
from scaleprop import durable
from scaleprop.errors import ConfigError
from scaleprop.storage import tensorfile
from scaleprop.storage.stored import StoredTensor

SMALL = 1 << 16  # bytes: such tensors stay in memory
_FACTS, _DIGESTS = "facts", "sha256"  # in a file's metadata, as JSON


class FolderShelf:
    """What ``passes.shelf`` asks for, in ``folder``. on_kept: told how many parameters are done.

    reused: how many of them an earlier run had done.
    """

    def __init__(self, folder: Path, on_kept: Callable[[int], None] = lambda _done: None) -> None:
        self._folder, self._on_kept = folder, on_kept
        self._done = self.reused = 0
        for part in folder.glob("*.part"):
            part.unlink()

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in a file named by its values; itself where it is small or in a file."""
        if isinstance(tensor, StoredTensor) or tensor.nbytes <= SMALL:
            return tensor
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensorfile.digest_of(tensor).encode())
        path = self._folder / f"{digest.hexdigest()}.safetensors"
        if not path.exists():
            self._write(path, [tensor], {})
        return self._read(path)[0]

    def keep(
        self, source: torch.Tensor, how: str, parts: Sequence[torch.Tensor],
        facts: Mapping[str, float],
    ) -> list[torch.Tensor]:
        """``parts`` in a file named by ``source`` and ``how``; as they are where that is small."""
        self._count()
        if not isinstance(source, StoredTensor):
            return list(parts)
        path = self._path(source, how)
        self._write(path, parts, facts)
        return self._read(path)

    def find(
        self, source: torch.Tensor, how: str
    ) -> tuple[list[torch.Tensor], dict[str, float]] | None:
        """What ``keep`` wrote; None where that is nothing, or damaged."""
        if not isinstance(source, StoredTensor):
            return None
        path = self._path(source, how)
        if not path.exists():
            return None
        try:
            metadata = tensorfile.read_header(path)[1]
            facts: dict[str, float] = json.loads(metadata[_FACTS])
            digests: list[str] = json.loads(metadata[_DIGESTS])
            parts = self._read(path)
        except (ConfigError, KeyError, ValueError):
            return None
        if [tensorfile.digest_of(part) for part in parts] != digests:
            return None
        self.reused += 1
        self._count()
        return parts, facts

    def _count(self) -> None:
        self._done += 1
        self._on_kept(self._done)

    def _path(self, source: StoredTensor, how: str) -> Path:
        text = json.dumps([scaleprop.__version__, torch.__version__, source.identity, how])
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _write(
        self, path: Path, parts: Sequence[torch.Tensor], facts: Mapping[str, float]
    ) -> None:
        digests = [tensorfile.digest_of(part) for part in parts]
        metadata = {_FACTS: json.dumps(dict(facts)), _DIGESTS: json.dumps(digests)}
        part = path.with_suffix(".part")
        tensorfile.write(part, {str(i): tensor for i, tensor in enumerate(parts)}, metadata)
        durable.replace(part, path)

    def _read(self, path: Path) -> list[torch.Tensor]:
        found = tensorfile.stored(path)
        return [found[str(index)] for index in range(len(found))]
