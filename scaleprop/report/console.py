"""Where tables are printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scaleprop.errors import BackendUnavailable
from scaleprop.extras import install_command

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 160  # of output that is not a terminal, in characters


def stdout_console() -> Console:
    """A console on the present stdout; wide where that is not a terminal.

    Raises:
        BackendUnavailable: without rich.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise BackendUnavailable(
            f"a report is shown with rich: {install_command('rich')}, "
            f"or save it: report.save('report.html')"
        ) from error
    made = Console()
    return made if made.is_terminal else Console(width=_WIDTH)
