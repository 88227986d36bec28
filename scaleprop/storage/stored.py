"""A tensor that stays on disk: computing with it reads it, and keeps nothing.

It is read by ``pread``, not mapped: mapped files count against a limit of address space.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from scaleprop.errors import ConfigError

_READ = 1 << 26  # bytes asked for at a time
# what is known without the values
_DESCRIBES = frozenset({
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad", "grad_fn",
    "nbytes", "itemsize", "is_sparse", "is_quantized", "is_meta", "is_nested", "names", "size",
    "stride", "dim", "numel", "element_size", "is_floating_point", "is_complex", "is_contiguous",
    "storage_offset", "is_cpu", "is_cuda", "__len__", "is_signed", "is_mkldnn", "_is_view",
    "untyped_storage", "is_inference", "is_conj", "is_neg",
})


class StoredTensor(torch.Tensor):
    """Bytes ``start`` and on of a file, as a contiguous tensor of ``dtype`` and ``shape``.

    Any operator gets its values, read anew. Two that are one tensor (tied weights) are the same
    object; ``data_ptr`` tells others apart. identity: tells its values from others', also in
    another process.
    """

    path: Path
    start: int
    identity: str

    @staticmethod
    def __new__(
        cls: type[StoredTensor], path: Path, start: int, dtype: torch.dtype, shape: Sequence[int]
    ) -> StoredTensor:
        """Nothing is read yet."""
        made: StoredTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
            cls, tuple(shape), dtype=dtype, device=torch.device("cpu"))
        made.path, made.start, made.identity = path, start, f"{path.name} {start}"
        return made

    def load(self) -> torch.Tensor:
        """The values, in memory of their own.

        Raises:
            ConfigError: where the file is gone or cut short.
        """
        whole = torch.empty(tuple(self.shape), dtype=self.dtype)
        if whole.numel():
            view = whole.reshape(-1).view(torch.uint8).numpy().data
            with self._opened() as file:
                for at in range(0, len(view), _READ):
                    self._read(file.fileno(), view[at : at + _READ], at)
        return whole

    def chunks(self, size: int) -> Iterator[memoryview]:
        """The bytes, ``size`` at a time."""
        total = math.prod(self.shape) * self.dtype.itemsize
        if not total:
            return
        buffer = torch.empty(min(size, total), dtype=torch.uint8).numpy().data
        with self._opened() as file:
            for at in range(0, total, size):
                part = buffer[: min(size, total - at)]
                self._read(file.fileno(), part, at)
                yield part

    def _opened(self) -> Any:
        try:
            return self.path.open("rb", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot read a tensor of {self.path}: {error}") from error

    def _read(self, handle: int, into: memoryview, at: int) -> None:
        done = 0
        while done < len(into):
            got = os.preadv(handle, [into[done:]], self.start + at + done)
            if not got:
                raise ConfigError(f"{self.path} is shorter than its header says. Remedy: fetch or "
                                  "write it again")
            done += got

    def data_ptr(self) -> int:
        """No address: a number that is another one for every other tensor."""
        return -id(self)

    def detach(self) -> StoredTensor:
        """Itself: it has no gradient."""
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StoredTensor({self.path.name!r}, {self.dtype}, {list(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on the values; on the tensor itself where it only describes."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _DESCRIBES:
            return super().__torch_function__(func, types, tuple(args), dict(kwargs or {}))
        return func(*_values(args), **_values(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """As ``__torch_function__``, below it."""
        return func(*_values(args), **_values(kwargs or {}))


def _values(arguments: Any) -> Any:
    return pytree.tree_map_only(StoredTensor, StoredTensor.load, arguments)
