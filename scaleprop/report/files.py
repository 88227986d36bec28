"""Writing a file so that it is either complete or not there."""

from __future__ import annotations

import os
from pathlib import Path

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


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


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
            f"cannot write {str(target)!r}: {error.strerror}; "
            f"create the folder {str(target.parent)!r} or choose another path"
        ) from error
