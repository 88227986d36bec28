"""The command line: ``scaleprop compile | analyze | export | formats | recipes | rules | …``."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from scaleprop.extras import install_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 (a bug), 2 (refused, reason on stderr), 130."""
    try:
        import click  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        sys.stderr.write(f"error: the command line needs {error.name}: "
                         f"{install_command('click')}\n")
        return 2
    from scaleprop.cli.app import run

    for stream in (sys.stdout, sys.stderr):  # "?" for what the terminal's encoding has no sign for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return run(arguments)
