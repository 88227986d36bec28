"""Writing a file so that it is either complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaleprop import durable
from scaleprop.errors import ConfigError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``ConfigError`` now for what ``write_bytes`` would refuse after the work."""
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"cannot write {str(target)!r}: it is a folder; add a file name")
    if not (target.parent.is_dir() and os.access(target.parent, os.W_OK | os.X_OK)):
        raise ConfigError(f"cannot write {str(target)!r}: create the folder "
                          f"{str(target.parent)!r}, or choose one that can be written to")


def write_report(
    path: str | os.PathLike[str], page: Callable[[], str], data: Callable[[], Any]
) -> None:
    """Write ``path``: the ``page`` as ``.html``, or ``data`` as ``.json``.

    Raises:
        ConfigError: on another suffix, or where the path cannot be written.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".html":
        write_text(path, page())
    elif suffix == ".json":
        write_text(path, json.dumps(data(), indent=1, allow_nan=False) + "\n")
    else:
        raise ConfigError(f"a report is saved as .html or .json, not "
                          f"{suffix or 'without a suffix'}: {os.fspath(path)!r}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, as ``write_bytes`` does; ``?`` for what UTF-8 has no bytes for, such
    as parts of file names that were no text."""
    write_bytes(path, text.encode(errors="replace"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data``, see ``durable.write``.

    Raises:
        ConfigError: where the folder is missing or not writable, or ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"cannot write {str(target)!r}: it is a folder; add a file name")
    try:
        durable.write(target, data)
    except OSError as error:
        raise ConfigError(
            f"cannot write {str(target)!r}: {error.strerror or error}; "
            f"create the folder {str(target.parent)!r} or choose another path"
        ) from error
