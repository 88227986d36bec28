"""The onnxruntime backend: FX graph → ONNX → a session on the CPU, or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch
from torch.utils import _pytree as pytree

from scaleprop.backends.base import Backend
from scaleprop.backends.onnxruntime.emitter import emit
from scaleprop.backends.onnxruntime.session import (
    OnnxExecutable,
    SessionConfig,
    open_session,
    run_in_memory,
    write,
)
from scaleprop.errors import MismatchError
from scaleprop.passes.base import Program, relative_error

__all__ = ["OnnxExecutable", "OnnxRuntimeBackend", "SessionConfig", "emit", "verify_file"]

Check = Callable[[OnnxExecutable], Any]


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeBackend(Backend):
    """Lowers programs to ONNX (opset 26) and runs them on onnxruntime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    config: SessionConfig = SessionConfig()

    def lower(self, program: Program) -> OnnxExecutable:
        """A session of ``program``, held in memory."""
        return run_in_memory(emit(program), self.config)

    def export(
        self, program: Program, path: Path | str, external_data: bool | None = None,
        check: Check | None = None,
    ) -> Path:  # fmt: skip
        """Write ``program`` as an ONNX file; returns its path.

        The file is checked by ``onnx.checker``, loaded, and given to ``check`` before it takes its
        name: an export that fails or is interrupted leaves an older file as it was.

        Args:
            external_data: weights in ``<path>.data``; None does so above 1.5 GB.
            check: called with the loaded file; raises where it is not good enough.

        Raises:
            ConfigError: where ``path`` is no ``.onnx`` name or cannot be written.
            UnsupportedOpError, LoweringError: where a node has no ONNX form.
        """
        target = Path(path)
        emitted = emit(program)

        def inspect(written: Path) -> None:
            onnx.checker.check_model(str(written))
            if check is not None:
                check(open_session(emitted, written, self.config))

        write(emitted, target, external_data, inspect)
        return target


def verify_file(
    path: Path | str, program: Program, bound: float,
    other_inputs: Sequence[Any] | None = None, config: SessionConfig | None = None,
) -> float:  # fmt: skip
    """Load an exported file, run it, and compare it with ``program`` run by torch.

    Args:
        bound: the largest allowed max|difference| / max|reference| of any output.
        other_inputs: flat leaves of another size, for a program with dynamic dimensions.

    Returns:
        The largest error found.

    Raises:
        MismatchError: naming the output that exceeds the bound.
    """
    executable = open_session(emit(program), Path(path), config or SessionConfig())
    example = pytree.tree_leaves((program.example_args, dict(program.example_kwargs)))
    return max(
        _compare(executable, program, leaves, bound, str(path))
        for leaves in (example, other_inputs) if leaves is not None
    )


def _compare(
    executable: OnnxExecutable, program: Program, leaves: Sequence[Any], bound: float, where: str
) -> float:
    args, kwargs = pytree.tree_unflatten(list(leaves), program.in_spec)
    with torch.no_grad():
        expected = pytree.tree_leaves(program.module(*args, **kwargs))
    worst = 0.0
    for index, (got, want) in enumerate(zip(executable(leaves), expected, strict=True)):
        if not isinstance(want, torch.Tensor):
            if got != want:
                raise MismatchError(f"{where}: output {index} is {got!r}, expected {want!r}")
            continue
        if got.shape != want.shape or got.dtype != want.dtype:
            raise MismatchError(f"{where}: output {index} is {got.dtype} {list(got.shape)}, "
                                f"expected {want.dtype} {list(want.shape)}")
        error = relative_error(got, want)
        if not error <= bound:
            raise MismatchError(f"{where}: output {index} differs from the reference by "
                                f"{error:.3g} of its largest value (bound {bound:.3g})")
        worst = max(worst, error)
    return worst
