"""What commands have in common: their options, and how they end. Heavy imports happen inside."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from scaleprop.backends.registry import BACKENDS
from scaleprop.errors import ConfigError

RECIPE = "int8-dynamic"  # where none is named

Command = Callable[..., Any]


def common(command: Command) -> Command:
    """``--json``, ``--verbose`` and ``--debug``; stdout belongs to the result."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else.")
    @click.option("-v", "--verbose", is_flag=True, help="Log what is done, on stderr.")
    @click.option("--debug", is_flag=True, help="Log everything; show tracebacks.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, verbose: bool, debug: bool, **kwargs: Any) -> Any:
        from scaleprop.cli.output import command_output

        _log_to_stderr(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
        with command_output(as_json) as emit:
            return command(*args, emit=emit if as_json else None, **kwargs)

    return wrapped


def _log_to_stderr(level: int) -> None:
    """scaleprop's log only: on the root logger, torch's internal traces would come along."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("scaleprop")
    logger.handlers = [handler]
    logger.setLevel(level)


inputs_option = click.option(
    "--inputs", metavar="MODULE:FUNCTION", help="Returns example inputs, if MODEL has none.",
)


def data_options(command: Command) -> Command:
    command = inputs_option(command)
    return click.option(
        "--calibration", metavar="MODULE:FUNCTION",
        help="Returns an iterable of example inputs; or takes the model and runs it.",
    )(command)


def model_options(command: Command) -> Command:
    """MODEL, and its inputs."""
    return click.argument("model", metavar="MODEL")(data_options(command))


def recipe_options(command: Command) -> Command:
    command = click.option("--target", help="With --recipe auto: whose formats.")(command)
    return click.option(
        "--recipe", default=RECIPE, show_default=True,
        help="A name from `scaleprop recipes`, a .toml or .json file, or auto.",
    )(command)


def decisions(command: Command) -> Command:
    """What decides how a model is compiled, besides the recipe."""
    options = (
        click.option("--backend", default=next(iter(BACKENDS)), show_default=True,
                     help=", ".join(BACKENDS)),
        click.option("--exclude", multiple=True, metavar="PATTERN",
                     help="What stays high: module path, parameter or operator; repeatable."),
        click.option("--include", multiple=True, metavar="PATTERN",
                     help="Quantize only these; repeatable."),
        click.option("-p", "--pass", "passes", multiple=True, metavar="NAME{OPTION=VALUE}",
                     help="One more pass to run, or options of a usual one; repeatable."),
        click.option("--verify", is_flag=True, help="Compare with the reference."),
    )
    for option in reversed(options):
        command = option(command)
    return command


report_option = click.option(
    "--report", type=click.Path(path_type=Path), help="Save the report as .html or .json.",
)


def compile_subject(model: str, inputs: str | None, calibration: str | None, **options: Any) -> Any:
    """The subject that the arguments name, and ``scaleprop.compile`` of it."""
    from scaleprop.api import compile as compile_model
    from scaleprop.cli.models import load_subject

    subject = load_subject(model, inputs)
    return subject, compile_model(
        subject.model, subject.inputs, calibration=calibration_of(calibration),
        progress=sys.stderr.isatty(), **options,
    )


def calibration_of(spec: str | None) -> Any:
    """The function itself where it takes the model; what it returns where it takes nothing."""
    from scaleprop.cli.models import call, resolve

    if spec is None:
        return None
    function = resolve(spec, "calibration")
    required = [
        parameter for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return function if required else call(spec, "calibration")


def finish(report: Any, files: Sequence[Path], report_path: Path | None, emit: Any) -> None:
    """Save the report where asked, and print it."""
    written = [str(file) for file in files]
    if report_path is not None:
        report.save(report_path)
        written.append(str(report_path))
    if emit:
        emit({"files": written, "report": report.to_dict()})
        return
    report.show()
    for file in written:
        click.echo(f"wrote {file}")


def check_suffix(report: Path | None) -> None:
    """Refuse before minutes of work what would be refused after them."""
    if report is not None and report.suffix.lower() not in (".html", ".json"):
        raise ConfigError(f"--report {str(report)!r}: a report is saved as .html or .json")
