"""Running an ONNX model on flat torch leaves, and writing it to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from scaleprop import durable
from scaleprop.backends.base import Executable
from scaleprop.backends.onnxruntime.emitter import Emitted, Port
from scaleprop.backends.onnxruntime.types import NUMPY_EXTRA, onnx_type
from scaleprop.errors import BackendError, ConfigError

INLINE_LIMIT = 1_500_000_000  # bytes of weights; a protobuf message ends at 2^31
DATA_SUFFIX = ".data"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """onnxruntime session options; the defaults are onnxruntime's own.

    threads: of one operator; None takes ``torch.get_num_threads()``.
    spinning: let idle threads spin between operators. Faster alone, harmful when several sessions
        or torch share the cores.
    entries: further ``session.*`` configuration entries.
    """

    threads: int | None = None
    spinning: bool = True
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def options(self) -> ort.SessionOptions:
        """As onnxruntime takes them."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads or torch.get_num_threads()
        options.log_severity_level = 3
        if not self.spinning:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        return options


class OnnxExecutable(Executable):
    """A model, in memory or in a file, with the ports of the program it came from.

    onnxruntime loads it at the first call: who compiles only to export never pays for it.
    """

    def __init__(self, emitted: Emitted, source: ir.Model | Path, config: SessionConfig) -> None:
        self._inputs, self._outputs = emitted.inputs, emitted.outputs
        self._lowerings = dict(emitted.lowerings)
        self._fed = [(i, p) for i, p in enumerate(emitted.inputs) if p.kind != "constant"]
        self._fetched = [port.name for port in emitted.outputs if port.kind != "constant"]
        self._source: ir.Model | Path | None = source
        self._config = config
        self._session: ort.InferenceSession | None = None
        self._opening = threading.Lock()

    def open(self) -> ort.InferenceSession:
        """The session; loaded once.

        Raises:
            BackendError: where onnxruntime refuses the model.
        """
        with self._opening:
            if self._session is None:
                assert self._source is not None
                self._session = _session(self._source, self._config)
                self._source = None  # the session has its own copy
            return self._session

    @property
    def lowerings(self) -> Mapping[str, str]:
        return self._lowerings

    def __call__(self, leaves: Sequence[Any]) -> list[Any]:
        """Run. Tensors are passed and returned without a copy.

        Raises:
            ConfigError: where the number of leaves or a dtype is wrong.
            BackendError: where onnxruntime fails.
        """
        if len(leaves) != len(self._inputs):
            raise ConfigError(f"expected {len(self._inputs)} inputs, got {len(leaves)}")
        results = self._run(leaves, self._fetched) if self._fetched else []
        found = iter(results)
        return [port.value if port.kind == "constant" else _from_ort(next(found), port)
                for port in self._outputs]

    def fetch(self, leaves: Sequence[Any], names: Collection[str]) -> dict[str, torch.Tensor]:
        """Values of the graph by name, as onnxruntime holds them; they must be graph outputs."""
        order = list(names)
        return {name: torch.from_numpy(value.numpy())
                for name, value in zip(order, self._run(leaves, order), strict=True)}

    def _run(self, leaves: Sequence[Any], names: Sequence[str]) -> Sequence[Any]:
        # held keeps the memory that onnxruntime reads alive until it has run
        held = {port.name: _contiguous(leaves[index], port) for index, port in self._fed}
        feed = {name: _to_ort(tensor) for name, tensor in held.items()}
        session = self.open()
        try:
            return session.run_with_ort_values(list(names), feed)
        except Exception as error:
            shapes = {name: list(tensor.shape) for name, tensor in held.items()}
            raise BackendError(f"onnxruntime failed on inputs {shapes}: {error}") from error


def _contiguous(leaf: Any, port: Port) -> torch.Tensor:
    tensor = leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=port.dtype)
    if tensor.dtype != port.dtype:
        raise ConfigError(f"input {port.name!r}: expected {port.dtype}, got {tensor.dtype}")
    return tensor.detach().cpu().contiguous()


def _to_ort(tensor: torch.Tensor) -> ort.OrtValue:
    """The same memory as an onnxruntime value."""
    if tensor.dtype in NUMPY_EXTRA:
        bits = torch.uint16 if tensor.dtype.itemsize == 2 else torch.uint8
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            tensor.view(bits).numpy(), int(onnx_type(tensor.dtype)))
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any, port: Port) -> Any:
    if port.dtype.itemsize == 1 and port.dtype in NUMPY_EXTRA:  # numpy knows these as bytes only
        tensor = torch.from_numpy(value.numpy().view(np.uint8)).view(port.dtype)
    else:
        tensor = torch.from_dlpack(value)
        tensor = tensor.view(torch.bool) if port.dtype is torch.bool else tensor
    return tensor.item() if port.kind == "number" else tensor


def _session(source: ir.Model | Path, config: SessionConfig) -> ort.InferenceSession:
    if isinstance(source, Path):
        return _load(str(source), config)
    if weight_bytes(source) <= INLINE_LIMIT:
        return _load(ir.to_proto(source).SerializeToString(), config)
    with tempfile.TemporaryDirectory(prefix="scaleprop-") as folder:
        path = Path(folder) / "model.onnx"
        _save(source, path, path.name + DATA_SUFFIX)
        return _load(str(path), config)


def _load(source: str | bytes, config: SessionConfig) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(source, config.options(), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BackendError(f"onnxruntime refused the model: {error}") from error


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values()
               if value.const_value is not None)


def _save(model: ir.Model, path: Path, data: str | None) -> None:
    """data: the name of a file beside ``path`` for the weights; None: in ``path``."""
    if data is not None:
        ir.save(model, path, external_data=data)
    else:
        ir.save(model, path)


def write(
    emitted: Emitted, path: Path, external: bool | None, check: Callable[[Path], None]
) -> None:
    """Write a model so that ``path`` is the old file or the whole, checked new one, at any moment.

    The files are written in a folder beside ``path``, checked there, flushed to the disk and
    renamed. external: weights in ``<path>.data``; None decides by size. Where the file that is
    replaced has its weights there, the new ones are called ``<path>.1.data``: each ``.onnx`` names
    its own, and the old ones are deleted last. Two exports to one ``path`` write one after the
    other.

    Raises:
        ConfigError: where ``path`` does not end in ``.onnx`` or cannot be written.
    """
    if path.suffix != ".onnx":
        raise ConfigError(f"cannot export to {str(path)!r}: the name must end in .onnx")
    if path.is_dir():
        raise ConfigError(f"cannot export to {str(path)!r}: it is a directory")
    if external is None:
        external = weight_bytes(emitted.model) > INLINE_LIMIT
    with _beside(path) as folder:
        written = folder / path.name
        try:
            data = _data_name(path) if external else None  # the model has its name in it
            _save(emitted.model, written, data)
        except OSError as error:
            raise ConfigError(f"cannot export to {str(path)!r}: {error}") from error
        check(written)
        if data is not None and (folder / data).exists():
            durable.replace(folder / data, path.with_name(data))
        durable.replace(written, path)
        _delete_others(path, data)


def _delete_others(path: Path, data: str | None) -> None:
    """Weights of the file that was replaced, or of an interrupted export."""
    for name in _data_names(path):
        if name != data:
            path.with_name(name).unlink(missing_ok=True)


def _data_names(path: Path) -> tuple[str, str]:
    """What weights beside ``path`` are called."""
    return f"{path.name}{DATA_SUFFIX}", f"{path.name}.1{DATA_SUFFIX}"


def _data_name(path: Path) -> str:
    """That of them which the file that is there does not read."""
    first, second = _data_names(path)
    if not path.is_file() or not path.stat().st_size:
        return first
    # Whatever the file is, and wherever it names its weights: it need not be parsed.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        return second if pages.find(os.fsencode(first)) >= 0 else first


@contextlib.contextmanager
def _beside(path: Path) -> Generator[Path]:
    """An empty folder on the same file system as ``path``, for one export at a time; gone whatever
    happens."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(durable.scratch(path, "exporting", in_turn=True))
        except OSError as error:
            raise ConfigError(f"cannot export to {str(path)!r}: {error}; "
                              f"remedy: choose an existing, writable folder") from error
        durable.empty(folder)  # of what an export left that was killed
        yield folder
