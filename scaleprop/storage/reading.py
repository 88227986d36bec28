"""What a saved model's folder holds, checked against its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from scaleprop.errors import ConfigError
from scaleprop.storage import tensorfile
from scaleprop.storage.writing import EXAMPLES, MANIFEST

_REMEDY = "Remedy: copy the folder again, or compile and save again"


class Folder:
    """A saved model of format 3.

    verify: compare every file and tensor with its SHA-256, else the shards' headers alone.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        """Raises:
            ConfigError: where the manifest is missing or damaged.
        """
        self.path, self._verify = path, verify
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            self._texts: Mapping[str, str] = dict(manifest["files"])
            self._shards = {name: (str(entry["header"]), dict(entry["tensors"]))
                            for name, entry in manifest["tensors"].items()}
            if set(self._texts) != {"config.json", "graph.json"} or EXAMPLES not in self._shards:
                raise ValueError("it names other files than a saved model has")
            if strange := [name for name in self._shards if Path(name).name != name]:
                raise ValueError(f"{strange[0]!r} is no name in this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError,
                RecursionError) as error:
            raise ConfigError(f"{path / MANIFEST} is missing or damaged: {error!r}. {_REMEDY}"
                              ) from error
        self._verify_texts()

    def _verify_texts(self) -> None:
        for name, digest in self._texts.items() if self._verify else ():
            try:
                found = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
            except OSError as error:
                raise ConfigError(f"{self.path / name} cannot be read: {error}. {_REMEDY}"
                                  ) from error
            if found != digest:
                raise ConfigError(f"{self.path / name} is damaged: its SHA-256 is not that of "
                                  f"{MANIFEST}. {_REMEDY}")

    def examples(self) -> dict[str, torch.Tensor]:
        """Example inputs and baseline outputs."""
        return self._read(EXAMPLES)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers, as pages of their files.

        Raises:
            ConfigError: naming the file, and the tensor, that is missing or damaged.
        """
        found: dict[str, torch.Tensor] = {}
        for name in self._shards:
            if name != EXAMPLES:
                found |= self._read(name)
        return found

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        path = self.path / name
        header, digests = self._shards[name]
        tensors = tensorfile.mapped(path)
        if hashlib.sha256(tensorfile.header_bytes(path)).hexdigest() != header:
            raise ConfigError(f"{path} is damaged in its header. {_REMEDY}")
        if tensors.keys() != digests.keys():
            raise ConfigError(f"{path} has other tensors than {MANIFEST} says. {_REMEDY}")
        for tensor in digests if self._verify else ():
            if tensorfile.digest_of(tensors[tensor]) != digests[tensor]:
                raise ConfigError(f"{path}: tensor {tensor!r} is damaged: its SHA-256 is not that "
                                  f"of {MANIFEST}. {_REMEDY}")
        return tensors
