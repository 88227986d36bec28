"""What a command prints: tables for people, pure JSON on stdout with ``--json``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import click
from rich import box
from rich.markup import escape
from rich.table import Table

from scaleprop.report.console import stdout_console


@contextlib.contextmanager
def command_output(as_json: bool) -> Generator[Callable[[Any], None]]:
    """Everything printed inside goes to stderr when ``as_json``; yields what prints the JSON.

    A model's own prints must not end up in the middle of a JSON document.
    """
    stdout = sys.stdout

    def emit(data: Any) -> None:
        stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield emit


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """Print ``rows``; columns named in ``numbers`` are aligned right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if column in numbers else "left",
                         no_wrap=index == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    stdout_console().print(table)


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], code: Sequence[str] = ()
) -> str:
    """``rows`` as Markdown; columns named in ``code`` are set as such."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    body = ([f"`{cell}`" if cell and column in code else cell
             for column, cell in zip(columns, row, strict=True)] for row in rows)
    return line(columns) + "|" + "---|" * len(columns) + "\n" + "".join(map(line, body))


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Print names and values, aligned."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        click.echo(f"{name:<{width}}  {value}")
