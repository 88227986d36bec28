"""``scaleprop sweep``: a sweep from a TOML file, or what a finished one found."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from scaleprop.errors import ConfigError
from scaleprop.recipes.training import SCHEMA_VERSION, TrainingRecipe
from scaleprop.report.files import check_writable, write_text
from scaleprop.sweeps import Sweep, sweep
from scaleprop.sweeps.picture import check_drawable

_FAILED = 1  # exit status where runs failed
_NOT_IN_FILES = ("fresh", "progress")


def run_sweep(
    *, config: Path | None, shown: Path | None, path: Path | None, jobs: int | None, fresh: bool,
    csv_path: Path | None, plot: Path | None, markdown: Path | None,
    emit: Callable[[Any], None] | None,
) -> int:
    """Run or load a sweep, write what is asked for, print it; returns the exit status.

    Raises:
        ConfigError: where there is not one of ``config`` and ``shown``, they make no sense, or a
            file could not be written. BackendUnavailable: for pictures without matplotlib.
    """
    if (config is None) == (shown is None):
        raise ConfigError("scaleprop sweep takes a .toml file, or --show and the file of runs")
    for file in filter(None, (csv_path, plot, markdown)):  # now, not after hours
        check_writable(file)
    if plot is not None:
        check_drawable(plot)
    if shown is not None:
        found = Sweep.load(shown)
    else:
        assert config is not None
        arguments = read(config)
        given = {"path": path, "jobs": jobs}
        arguments.update({name: value for name, value in given.items() if value is not None})
        found = sweep(**arguments, fresh=fresh)
    _report(found, csv_path, plot, markdown, emit)
    return _FAILED if found.errors() else 0


def _report(
    found: Sweep, csv_path: Path | None, plot: Path | None, markdown: Path | None,
    emit: Callable[[Any], None] | None,
) -> None:
    if csv_path is not None:
        found.to_csv(csv_path)
    if plot is not None:
        found.plot(plot)
    if markdown is not None:
        write_text(markdown, found.table())
    written = [str(file) for file in (csv_path, plot, markdown) if file is not None]
    if emit is not None:
        emit({**found.to_dict(), "files": written})
        return
    found.show()
    for file in written:
        click.echo(f"wrote {file}")


def read(config: Path) -> dict[str, Any]:
    """What ``scaleprop.sweep`` is to be called with.

    Raises:
        ConfigError: where the file cannot be read, or has what is no argument.
    """
    try:
        given = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {str(config)!r}: {error}") from error
    parameters = inspect.signature(sweep).parameters
    known = [name for name in parameters if name not in _NOT_IN_FILES]
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"{config}: no argument of a sweep is called {', '.join(unknown)}; "
                          f"known: {', '.join(known)}")
    required = [name for name, parameter in parameters.items()
                if parameter.default is parameter.empty]
    if missing := [name for name in required if name not in given]:
        raise ConfigError(f"{config} does not say {', '.join(missing)}")
    for name in ("recipe", "baseline"):
        if isinstance(given.get(name), Mapping):
            given[name] = _recipe(given[name])
    if given.get("baseline") == "none":  # TOML has no null
        given["baseline"] = None
    return given


def _recipe(given: Mapping[str, Any]) -> TrainingRecipe:
    """A recipe that is written out: operands by role, and what else it has."""
    return TrainingRecipe.from_dict(
        {"schema_version": SCHEMA_VERSION, "name": "given", "description": "", **given})
