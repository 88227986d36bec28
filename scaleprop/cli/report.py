"""``scaleprop report``: look at reports that were saved as JSON, and compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from scaleprop.cli.options import common
from scaleprop.errors import ConfigError

if TYPE_CHECKING:
    from scaleprop.report import Report, ScaleReport

_FILE = click.Path(path_type=Path)


def _load(file: Path) -> Report | ScaleReport:
    """A report; or that of a training step, whose schema is another."""
    from scaleprop.report import Report, ScaleReport
    from scaleprop.report.scales import SCHEMA

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        data = None  # said below
    is_step = isinstance(data, dict) and cast(dict[str, Any], data).get("schema") == SCHEMA
    return ScaleReport.load(file) if is_step else Report.load(file)


@click.group("report")
def report_group() -> None:
    """Show, draw and compare reports that were saved as .json."""


@report_group.command("show")
@click.argument("file", metavar="A.json", type=_FILE)
@common
def show_command(file: Path, emit: Any) -> None:
    """Print a report, or that of a training step: a summary and a row per tensor."""
    report = _load(file)
    if emit:
        emit(report.to_dict())
        return
    report.show()


@report_group.command("html")
@click.argument("file", metavar="A.json", type=_FILE)
@click.option("-o", "--out", required=True, type=_FILE, help="The .html file.")
@common
def html_command(file: Path, out: Path, emit: Any) -> None:
    """Draw a report, or that of a training step, as one offline HTML file."""
    if out.suffix.lower() != ".html":
        raise ConfigError(f"--out {str(out)!r}: the page is a .html file")
    _load(file).save(out)
    if emit:
        emit({"files": [str(out)]})
        return
    click.echo(f"wrote {out}")


@report_group.command("diff")
@click.argument("before", metavar="A.json", type=_FILE)
@click.argument("after", metavar="B.json", type=_FILE)
@click.option("--threshold", default=0.0, show_default=True, metavar="DB",
              help="Changes of SQNR of at most so many decibels are none.")
@common
def diff_command(before: Path, after: Path, threshold: float, emit: Any) -> int:
    """Say what B has otherwise than A, tensor by tensor: the greatest loss of SQNR first.

    Exit status 0 where they are equal, 1 where they differ, 2 where one cannot be read.
    """
    from scaleprop.report import Report

    difference = Report.load(before).diff(Report.load(after), threshold)
    if emit:
        emit(difference.to_dict())
    else:
        difference.show()
    return int(bool(difference))


@report_group.command("schema")
@click.option("--markdown", type=_FILE, help="Write it as a page there instead.")
@common
def schema_command(markdown: Path | None, emit: Any) -> None:
    """Print the JSON Schema of a report's .json file."""
    from scaleprop.report import schema
    from scaleprop.report.files import write_text

    if markdown is not None:
        write_text(markdown, schema.markdown())
        click.echo(f"wrote {markdown}")
    elif emit:
        emit(schema.report_schema())
    else:
        click.echo(json.dumps(schema.report_schema(), indent=1, ensure_ascii=False))
