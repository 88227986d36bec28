"""Backends by name, imported when first asked for, so that none costs those who do not use it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping

from scaleprop.backends.base import Backend
from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import EXTRAS, install_command

# name → (module, class)
BACKENDS: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("scaleprop.backends.onnxruntime", "OnnxRuntimeBackend"),
    "inductor": ("scaleprop.backends.inductor", "InductorBackend"),
    "reference": ("scaleprop.backends.reference", "ReferenceBackend"),
    "cuda": ("scaleprop.backends.cuda.backend", "CudaBackend"),
}


def backend_named(name: str) -> Backend:
    """The backend of this name, with default options.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
        BackendUnavailable: where a package it needs is not installed, naming the extra.
    """
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        guess = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"unknown backend {name!r}{guess}; known: {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name]
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise BackendUnavailable(
            f"backend {name!r} needs the package {package!r}: {install_command(package)}"
        ) from error
    return backend()
