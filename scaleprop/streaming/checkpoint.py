"""A folder of safetensors files, as the parameters of a module that has none yet."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from scaleprop.errors import ConfigError
from scaleprop.storage import tensorfile
from scaleprop.storage.stored import StoredTensor
from scaleprop.streaming.shelf import SMALL

_SHOWN = 5  # how many names an error lists


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Every tensor of ``directory`` by name; nothing but headers is read."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """The files that an ``*.safetensors.index.json`` names, or all ``*.safetensors``.

        Raises:
            ConfigError: where there are none, one is missing or damaged, two have one name, or the
                index names a tensor that its file lacks.
        """
        indices = sorted(directory.glob("*.safetensors.index.json"))
        if len(indices) > 1:
            raise ConfigError(f"{directory} has several indices: "
                              f"{', '.join(path.name for path in indices)}. Remedy: keep one")
        places = _places(indices[0]) if indices else None
        files = sorted(directory.glob("*.safetensors")) if places is None \
            else [directory / name for name in sorted(set(places.values()))]
        if not files:
            raise ConfigError(f"{directory} has no safetensors files. Remedy: the folder that "
                              "save_pretrained(…, safe_serialization=True) wrote, for example")
        found: dict[str, StoredTensor] = {}
        for path in files:
            for name, tensor in _identified(path).items():
                if places is not None and places.get(name) != path.name:
                    continue
                if name in found:
                    raise ConfigError(f"tensor {name!r} is both in {found[name].path.name} and in "
                                      f"{path.name}. Remedy: keep one of the files")
                found[name] = tensor
        if lost := sorted(set(places or ()) - set(found)):
            raise ConfigError(f"{directory}: {_list(lost)} are not in the files that the index "
                              "names. Remedy: fetch the folder again")
        return cls(directory, found)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the floating-point tensors, where it is one."""
        found = {tensor.dtype for tensor in self.tensors.values() if tensor.is_floating_point()}
        return found.pop() if len(found) == 1 else None

    def assigned(
        self, model: torch.nn.Module, ignore: Sequence[str] = ()
    ) -> dict[str, torch.Tensor]:
        """Name → stored tensor, for every parameter and persistent buffer of ``model``.

        ignore: shell patterns of names that the folder may have beside those.

        Raises:
            ConfigError: tensors that are missing, left over, or of another shape or dtype; tied
                ones that differ.
        """
        groups: dict[int, list[str]] = {}
        wanted = model.state_dict(keep_vars=True)
        for name, tensor in wanted.items():
            groups.setdefault(id(tensor), []).append(name)
        missing = [names[0] for names in groups.values() if not set(names) & set(self.tensors)]
        extra = sorted(name for name in set(self.tensors) - set(wanted)
                       if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore))
        if missing or extra:
            raise ConfigError(self._mismatch(missing, extra))
        found: dict[str, torch.Tensor] = {}
        for names in groups.values():
            stored = self._same(names)
            self._check(names[0], stored, wanted[names[0]])
            # read over and over, and of no weight: norms, biases, statistics
            kept = stored if stored.nbytes > SMALL else stored.load()
            found |= dict.fromkeys(names, kept)
        return found

    def _mismatch(self, missing: Sequence[str], extra: Sequence[str]) -> str:
        said = [f"lacks {_list(missing)}"] if missing else []
        said += [f"has {_list(extra)}, which the model does not"] if extra else []
        return (f"{self.directory} {' and '.join(said)}. Remedy: a model= factory whose "
                "state_dict() has the folder's names, or ignore=[pattern, …] for what is left over")

    def _same(self, names: Sequence[str]) -> StoredTensor:
        """What is stored for names of one parameter.

        Raises:
            ConfigError: where it is stored under several of them, and differs.
        """
        first, *others = [name for name in names if name in self.tensors]
        stored = self.tensors[first]
        for other in others:
            pairs = zip(tensorfile.chunks(stored), tensorfile.chunks(self.tensors[other]),
                        strict=False)
            if (self.tensors[other].shape != stored.shape
                    or any(left != right for left, right in pairs)):
                raise ConfigError(f"{first!r} and {other!r} are one parameter of the model, but "
                                  f"differ in {self.directory}. Remedy: a model that does not tie "
                                  "them")
        return stored

    def _check(self, name: str, stored: StoredTensor, wanted: torch.Tensor) -> None:
        if stored.shape != wanted.shape:
            raise ConfigError(f"{stored.path.name}: {name!r} has shape {list(stored.shape)}, the "
                              f"model's has {list(wanted.shape)}. Remedy: the model that the "
                              "folder was saved from")
        if stored.dtype != wanted.dtype:
            raise ConfigError(f"{stored.path.name}: {name!r} is {stored.dtype}, the model's is "
                              f"{wanted.dtype}. Remedy: make the model in {stored.dtype}, as "
                              "model.to(…) in the factory does")


def _places(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} cannot be read: {error!r}. Remedy: fetch it again") from error
    if strange := [file for file in places.values() if Path(file).name != file]:
        raise ConfigError(f"{index} names {strange[0]!r}, which is no file of its folder")
    return places


def _identified(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, each with what tells it from others: not its values, which would have
    to be read, but the file's header, size and time."""
    tensors = tensorfile.stored(path)
    status = path.stat()
    header = hashlib.sha256(tensorfile.header_bytes(path)).hexdigest()
    for name, tensor in tensors.items():
        tensor.identity = f"{header} {status.st_size} {status.st_mtime_ns} {name}"
    return tensors


def _list(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(map(repr, every[:_SHOWN])) + more
