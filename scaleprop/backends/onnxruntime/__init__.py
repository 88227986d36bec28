"""The onnxruntime backend: FX graph → ONNX → a session on the CPU, or a file."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx

from scaleprop.backends.base import Backend
from scaleprop.backends.onnxruntime.conformance import check_nodes
from scaleprop.backends.onnxruntime.emitter import emit
from scaleprop.backends.onnxruntime.session import (
    OnnxExecutable,
    SessionConfig,
    write,
)
from scaleprop.backends.onnxruntime.sizes import other_size
from scaleprop.passes.base import Program

__all__ = ["OnnxExecutable", "OnnxRuntimeBackend", "SessionConfig", "check_nodes", "emit"]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeBackend(Backend):
    """Lowers programs to ONNX (opset 26) and runs them on onnxruntime's CPU provider."""

    name: ClassVar[str] = "onnxruntime"
    config: SessionConfig = dataclasses.field(default_factory=SessionConfig)

    def lower(self, program: Program) -> OnnxExecutable:
        """``program`` as an ONNX model in memory; onnxruntime loads it when it is first called."""
        emitted = emit(program)
        return OnnxExecutable(emitted, emitted.model, self.config)

    def export(
        self, program: Program, path: Path | str, external_data: bool | None = None,
        metadata: Mapping[str, str] | None = None, check: bool = True,
    ) -> Path:
        """Write ``program`` as an ONNX file; returns its path.

        The file is checked by ``onnx.checker``, loaded, run on the example inputs and compared
        with the reference node by node (``conformance``) before it takes its name: an export that
        fails or is interrupted leaves an older file as it was. Where sizes are dynamic, another
        one is run and compared too; a warning says where the program's guards allow none of those
        that are tried.

        Args:
            external_data: weights in ``<path>.data``; None does so above 1.5 GB.
            metadata: as for ``emit``.
            check: False only writes: nothing is loaded, run or compared.

        Raises:
            ConfigError: where ``path`` is no ``.onnx`` name or cannot be written.
            UnsupportedOpError, LoweringError: where a node has no ONNX form.
            MismatchError: where a node differs from the reference by more than its bound.
        """
        target = Path(path)
        emitted = emit(program, metadata)

        def hold(written: Path) -> None:
            if not check:
                return
            onnx.checker.check_model(str(written))
            OnnxExecutable(emitted, written, self.config).open()
            other = other_size(program)
            if other is None and any(program.dynamic_axes.values()):
                logger.warning("%s: checked at the example's sizes alone: its dimensions may vary, "
                               "but no other size that was tried satisfies %s",
                               target, "; ".join(program.guards))
            inputs = [leaves for leaves in (program.example_leaves, other) if leaves is not None]
            worst = check_nodes(emitted, written, program, inputs, self.config)
            logger.info("%s: every node within its bound; largest error %.1e", target, worst)

        write(emitted, target, external_data, hold)
        return target

    def verify(self, program: Program) -> None:
        """As ``export``, into a folder that is deleted.

        Raises:
            As ``export``.
        """
        with tempfile.TemporaryDirectory(prefix="scaleprop-") as folder:
            self.export(program, Path(folder) / "model.onnx")
