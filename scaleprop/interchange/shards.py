"""Folders of safetensors: written a shard at a time, under another name until complete."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from scaleprop import durable, storage
from scaleprop.errors import ConfigError
from scaleprop.interchange.libraries import library

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PRODUCER = "scaleprop"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WHY = "reading and writing checkpoints"


def parse_size(size: int | str) -> int:
    """Bytes, from a number or from text such as ``5GB`` or ``200MiB``.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if found < 1 or isinstance(size, bool):
        raise ConfigError(f"max_shard_size={size!r}: give bytes, or text such as '5GB'")
    return found


class ShardWriter:
    """Puts tensors into files of at most ``limit`` bytes; only one shard is held at a time.

    A tensor larger than ``limit`` gets a file of its own.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._shard: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._files: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor; it is kept until its shard is full."""
        if self._shard and self._size + tensor.nbytes > self._limit:
            self._flush()
        self._shard[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is left, and the index where there are several files."""
        if self._shard or not self._files:
            self._flush()
        count = len(self._files)
        if count == 1:
            os.replace(self._folder / _name(1, 0), self._folder / SINGLE)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            os.replace(self._folder / _name(number, 0), self._folder / _name(number, count))
            places.update(dict.fromkeys(names, _name(number, count)))
        index = {"metadata": {"total_size": self._total},
                 "weight_map": dict(sorted(places.items()))}  # fmt: skip
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        flat: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self._shard.items():
            own = tensor.detach().cpu().contiguous()
            if own.untyped_storage().data_ptr() in seen:  # safetensors refuses shared memory
                own = own.clone()
            seen.add(own.untyped_storage().data_ptr())
            flat[name] = own
        path = self._folder / _name(len(self._files) + 1, 0)
        library("safetensors.torch", _WHY).save_file(flat, path, {"format": "pt"})
        self._files.append(list(flat))
        self._shard, self._size = {}, 0


def _name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


@contextmanager
def new_folder(directory: Path) -> Generator[Path]:
    """A folder to write to, which becomes ``directory`` when the block ends without an error.

    Raises:
        ConfigError: where ``directory`` holds what this did not write, or cannot be written.
    """
    storage.check_replaceable(directory, _is_ours, "a checkpoint that scaleprop wrote")
    directory = directory.resolve()  # a link stays, and what it leads to is replaced
    if directory == Path.cwd():
        raise ConfigError(f"{directory} is the working directory, which cannot be replaced; choose "
                          "another path")
    storage.make_parents(directory)
    try:
        with durable.scratch(directory, "writing") as folder:
            durable.empty(folder)  # of what a write left that was killed
            yield folder
            for path in folder.rglob("*"):
                durable.flush(path)
            durable.install(folder, directory)
    except OSError as error:
        raise storage.not_written(directory, error) from error


def _is_ours(directory: Path, config: Any) -> bool:
    try:
        return config["quantization_config"]["producer"].startswith(PRODUCER)
    except (LookupError, TypeError, AttributeError):
        return False


class ShardReader:
    """The tensors of a folder's safetensors, each read when it is asked for.

    Raises:
        ConfigError: where there are none, or a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[str, Any] = {}
        self._files = self._find()

    @property
    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Tensor:
        file = self._file(self._files[name])
        try:
            return file.get_tensor(name)
        except library("safetensors", _WHY).SafetensorError as error:
            raise ConfigError(f"{self._directory / self._files[name]}: {error}") from error

    def _find(self) -> dict[str, str]:
        if (self._directory / SINGLE).is_file():
            return dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        index = self._directory / INDEX
        if index.is_file():
            try:
                files: dict[str, str] = json.loads(index.read_text())["weight_map"]
                outside = [file for file in files.values() if Path(file).name != file]
            except (ValueError, LookupError, TypeError, AttributeError,
                    RecursionError) as error:
                raise ConfigError(f"{index} is damaged: {error}") from error
            if outside:
                raise ConfigError(f"{index} names {outside[0]!r}, which is not in its folder")
            return files
        pickled = sorted(path.name for path in self._directory.glob("*.bin"))
        if pickled:
            raise ConfigError(f"{self._directory} has {pickled[0]}, which would have to be "
                              "unpickled. Remedy: a checkpoint of safetensors")
        raise ConfigError(f"{self._directory} has neither {SINGLE} nor {INDEX}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            safetensors = library("safetensors", _WHY)
            try:
                self._open[name] = safetensors.safe_open(self._directory / name, framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise ConfigError(f"{self._directory / name}: {error}") from error
        return self._open[name]
