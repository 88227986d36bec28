"""The optional libraries, which nothing here imports before it needs them."""

from __future__ import annotations

import importlib
from typing import Any

from scaleprop.errors import BackendUnavailable
from scaleprop.extras import install_command


def library(module: str, why: str) -> Any:
    """An optional module.

    Raises:
        BackendUnavailable: where its package is not installed, naming what installs it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise BackendUnavailable(f"{why} needs {package}: {install_command(package)}") from error
