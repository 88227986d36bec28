"""safetensors files, written and read a tensor at a time (huggingface.co/docs/safetensors).

    8 bytes: n, little-endian │ n bytes: JSON header │ the tensors' bytes, one after another

The header follows from names, dtypes and shapes alone, so it is written before any tensor is
looked at. Wider dtypes come first: each tensor is then aligned to its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from scaleprop.errors import ConfigError
from scaleprop.storage.stored import StoredTensor

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 24  # bytes written at a time
_LARGEST_HEADER = 100 << 20  # as the format's own reader has it


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is: ``start`` and ``end`` count from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_entries(path: Path) -> dict[str, Entry]:
    """Name → place of every tensor in ``path``.

    Raises:
        ConfigError: where the file is missing, cut short, or no safetensors file; where tensors
            overlap, or bytes are none's.
    """
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """``read_entries``, and the file's metadata.

    Raises:
        As ``read_entries``.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        metadata: dict[str, str] = dict(header.get("__metadata__") or {})
        entries = {name: _entry(name, found, 8 + length) for name, found in header.items()
                   if name != "__metadata__"}
        end = _end(entries, 8 + length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no safetensors file: {error}. Remedy: fetch or write it "
                          "again") from error
    if end != size:
        raise ConfigError(f"{path} has {size} bytes, its header speaks of {end}. Remedy: fetch or "
                          "write it again")
    return entries, metadata


def header_bytes(path: Path) -> bytes:
    """What comes before the tensors of a safetensors file."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))


def _entry(name: str, found: Mapping[str, Any], base: int) -> Entry:
    if found["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {found['dtype']!r}; known: "
                         f"{', '.join(DTYPES)}")
    dtype, shape = DTYPES[found["dtype"]], tuple(map(int, found["shape"]))
    start, end = map(int, found["data_offsets"])
    if min(0, start, *shape) < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {name!r}: {end - start} bytes are no {found['dtype']} "
                         f"{list(shape)}")
    return Entry(dtype, shape, base + start, base + end)


def _end(entries: Mapping[str, Entry], end: int) -> int:
    """Where the tensors, which begin at ``end``, do; the format has them side by side."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            what = "overlaps the one before it" if entry.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {name!r} {what}: it begins at byte {entry.start}, not {end}")
        end = entry.end
    return end


def ordered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In the order in which they are written."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def header(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a file of ``tensors`` begins with.

    Raises:
        ConfigError: a dtype that safetensors files cannot hold.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in ordered(tensors).items():
        if tensor.dtype not in _NAMES:
            raise ConfigError(f"tensor {name!r} is {tensor.dtype}, which safetensors files cannot "
                              f"hold; they can: {', '.join(DTYPES)}")
        end = start + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                         "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Write ``tensors``, one at a time; returns the SHA-256 of each one's bytes."""
    digests: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(header(tensors, metadata))
        for name, tensor in ordered(tensors).items():
            digest = hashlib.sha256()
            for chunk in chunks(tensor):
                digest.update(chunk)
                file.write(chunk)
            digests[name] = digest.hexdigest()
    return digests


def chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order; of one on disk, a few at a time."""
    if isinstance(tensor, StoredTensor):
        yield from tensor.chunks(_CHUNK)
        return
    view = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(view), _CHUNK):
        yield view[start : start + _CHUNK]


def digest_of(tensor: torch.Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    digest = hashlib.sha256()
    for chunk in chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def stored(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, each read anew whenever it is computed with.

    Raises:
        As ``read_entries``.
    """
    return {name: StoredTensor(path, entry.start, entry.dtype, entry.shape)
            for name, entry in read_entries(path).items()}


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as its pages, which are read when they are first touched.

    Raises:
        As ``read_entries``.
    """
    entries = read_entries(path)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writes stay private
    return {name: _view(pages, entry) for name, entry in entries.items()}


def _view(pages: mmap.mmap, entry: Entry) -> torch.Tensor:
    size = entry.end - entry.start
    if not size:
        return torch.empty(entry.shape, dtype=entry.dtype)
    raw = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=entry.start)
    if entry.start % entry.dtype.itemsize:  # another writer's order: a copy of this one
        raw = raw.clone()
    return raw.view(entry.dtype).view(entry.shape)
