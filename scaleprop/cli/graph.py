"""``scaleprop graph``: one block of a model as SVG, or in GraphViz's language."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scaleprop.errors import ConfigError


def drawing(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is drawn, and where."""
    options = (
        click.option("--loss", metavar="MODULE:FUNCTION",
                     help="Draw a training step instead: as for analyze."),
        click.option("--training", metavar="RECIPE",
                     help="With --loss: what it casts; else RMS of values and gradients."),
        click.option("--block", help="A module's path, or '' for all; else the most typical."),
        click.option("--depth", type=int, help="Levels of modules drawn operator by operator."),
        click.option("-o", "--out", required=True, type=click.Path(path_type=Path),
                     help="A .svg file, or .dot for GraphViz."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def draw(
    *, emit: Callable[[Any], None] | None, compile_model: Callable[..., Any], model: str,
    inputs: str | None, loss: str | None, training: str | None, block: str | None,
    depth: int | None, out: Path, **options: Any,
) -> None:
    """Draw a block of what ``model`` names, write it, and say where.

    Raises:
        ConfigError: where options make no sense together, or the file could not be written.
    """
    from scaleprop.analysis.training_view import prepared_view, training_view
    from scaleprop.cli.models import load_subject, resolve
    from scaleprop.report.files import check_writable
    from scaleprop.report.graph import check_suffix

    check_suffix(out)
    check_writable(out)  # now, not after compiling
    if training is not None and loss is None:
        raise ConfigError("--training draws a training step: add --loss MODULE:FUNCTION")
    if loss is None:
        _, compiled = compile_model(model, inputs, **options)
        view = compiled.graph_view(block, depth)
    else:
        subject = load_subject(model, inputs)
        loss_fn: Any = loss if loss == "output" else resolve(loss, "loss")
        view = training_view(subject.model, subject.inputs, loss_fn, block, depth) \
            if training is None else \
            prepared_view(subject.model, subject.inputs, loss_fn, training, block, depth)
    view.save(out)
    if emit is not None:
        emit({"files": [str(out)], "block": view.to_dict()})
        return
    click.echo(f"{view.title}: {len(view.nodes)} boxes, {len(view.edges)} edges")
    click.echo(f"wrote {out}")
