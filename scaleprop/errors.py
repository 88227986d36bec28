"""Everything scaleprop raises on purpose.

    ScalePropError
    ├── ConfigError (ValueError)                recipe, option or argument that makes no sense
    ├── FormatError (ValueError)                unknown format, or data a format cannot take
    ├── UnsupportedOpError (NotImplementedError) an operator that capture or a backend cannot take
    ├── CaptureError                            torch.export could not trace the model
    ├── CalibrationError (ValueError)           calibration data missing, empty, NaN or Inf
    ├── PassError
    │   ├── PreconditionError                   a pass was given a program it cannot work on
    │   └── PostconditionError                  a pass broke its promise
    └── BackendError
        ├── LoweringError                       a node has no faithful lowering
        ├── MismatchError                       a lowered program differs from the reference
        └── BackendUnavailable (ImportError)    an optional package or device is missing

A message says what was found, where (node, operator, the user's source line) and what to do.
"""

from __future__ import annotations

import torch.fx


class ScalePropError(Exception):
    """Base of every error raised by scaleprop."""


class ConfigError(ScalePropError, ValueError):
    """A recipe, option or argument that makes no sense; the message lists what would."""


class FormatError(ScalePropError, ValueError):
    """An unknown or contradictory format, or a tensor that the format cannot represent."""


class UnsupportedOpError(ScalePropError, NotImplementedError):
    """An operator that cannot be taken; the message names node, operator, source line, remedy."""


class CaptureError(ScalePropError):
    """``torch.export`` could not trace the model with these inputs."""


class CalibrationError(ScalePropError, ValueError):
    """Calibration data that is missing, empty, not finite, or does not fit the model."""


class PassError(ScalePropError):
    """A pass failed."""


class PreconditionError(PassError):
    """A pass was given a program that it cannot work on."""


class PostconditionError(PassError):
    """The result of a pass is not what the pass promises."""


class BackendError(ScalePropError):
    """A backend failed."""


class LoweringError(BackendError):
    """A node has no faithful lowering on this backend."""


class MismatchError(BackendError):
    """A lowered program differs from the reference by more than its stated bound."""


class BackendUnavailable(BackendError, ImportError):
    """An optional package, or the device, that a backend needs is missing."""


def source_line(node: torch.fx.Node) -> str:
    """The user's innermost line behind ``node``, as ``file.py:12 in forward``, or ``unknown``."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    if not frames:
        return "unknown source line"
    path, line, *function = frames[-1].removeprefix("File ").split(", ")
    place = f"{path.strip(chr(34))}:{line.removeprefix('line ')}"
    return f"{place} {function[0]}" if function else place


def describe(node: torch.fx.Node) -> str:
    """``node 'x' (aten.mm.default, model.py:12 in forward)``: how messages name a node."""
    return f"node {node.name!r} ({node.target}, {source_line(node)})"
