"""A progress bar on standard error, where rich is installed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(
    enabled: bool, total: int | None, what: str = "calibrating"
) -> Generator[Callable[[int], None]]:
    """Yields ``update(how many are done)``; does nothing where disabled or without rich."""
    if not enabled:
        yield lambda _done: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda _done: None
        return
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)
