"""Where measurements go: CSV, TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command
from scaleprop.monitors.records import GradientRecord, Measurement, OperandRecord
from scaleprop.report.files import check_writable

_GRADIENT = "gradient"  # the role of rows that are gradients
_OPERAND = tuple(field.name for field in dataclasses.fields(OperandRecord))
_NUMBERS = ("amax", "rms", "underflow", "saturated", "sqnr_db", "bias", "flipped", "oscillation")
_COLUMNS = ("step", *_OPERAND, "cosine", "norm_ratio")


class Writer(Protocol):
    """Takes measurements as they are made."""

    def write(self, measurement: Measurement) -> None:
        """Take one."""

    def close(self) -> None:
        """Nothing more comes."""


class CsvWriter:
    """A row for each operand, and for each gradient (role ``gradient``), of each measurement;
    added to what the file holds. ``exponents``: ``-3:40 -2:8``. Floats are written exactly."""

    def __init__(self, path: str | PathLike[str]) -> None:
        """Raise ``ConfigError`` where the file cannot be written, or is there and has other
        columns."""
        self._path = Path(path)
        check_writable(self._path)
        if self._has_rows:
            _check(self._path)

    @property
    def _has_rows(self) -> bool:
        return self._path.exists() and self._path.stat().st_size > 0

    def write(self, measurement: Measurement) -> None:
        """Add a measurement's rows; the file is whole after each."""
        new = not self._has_rows
        with self._path.open("a", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            if new:
                writer.writeheader()
            writer.writerows(_operand_row(measurement.step, each) for each in measurement.operands)
            writer.writerows({"step": measurement.step, "layer": each.parameter, "role": _GRADIENT,
                              "cosine": each.cosine, "norm_ratio": each.norm_ratio}
                             for each in measurement.gradients)

    def close(self) -> None:
        """Nothing is open."""


def _operand_row(step: int, record: OperandRecord) -> dict[str, Any]:
    found = {name: getattr(record, name) for name in _OPERAND}
    found["exponents"] = " ".join(f"{at}:{count}" for at, count in record.exponents.items())
    return {"step": step, **found}


def _check(path: Path) -> None:
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if tuple(found) != _COLUMNS:
        raise ConfigError(f"{path} has the columns {', '.join(found)}, not those of measurements: "
                          f"{', '.join(_COLUMNS)}. Remedy: another file")


def read_csv(path: str | PathLike[str]) -> list[Measurement]:
    """What a ``CsvWriter`` wrote, to plot or to go on with.

    Raises:
        ConfigError: where there is no such file, or it has other columns or a row cut short.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file")
    _check(Path(path))
    found: dict[int, tuple[list[OperandRecord], list[GradientRecord]]] = {}
    with Path(path).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                record = _read(row)
            except (TypeError, ValueError, AttributeError) as error:
                raise ConfigError(f"{path}: row {number} is cut short or no measurement: {error}. "
                                  "Remedy: take it out") from error
            operands, gradients = found.setdefault(int(row["step"]), ([], []))
            if isinstance(record, GradientRecord):
                gradients.append(record)
            else:
                operands.append(record)
    return [Measurement(step=step, operands=tuple(operands), gradients=tuple(gradients))
            for step, (operands, gradients) in found.items()]


def _read(row: Mapping[str, str]) -> OperandRecord | GradientRecord:
    if row["role"] == _GRADIENT:
        return GradientRecord(parameter=row["layer"], cosine=float(row["cosine"]),
                              norm_ratio=float(row["norm_ratio"]))
    numbers: dict[str, Any] = {name: float(row[name]) if row[name] else None for name in _NUMBERS}
    pairs = (pair.split(":") for pair in row["exponents"].split())
    return OperandRecord(layer=row["layer"], role=row["role"], format=row["format"],
                         exponents={int(at): int(count) for at, count in pairs}, **numbers)


class TensorBoardWriter:
    """Scalars ``<role>/<metric>/<layer>`` and ``gradient/<metric>/<parameter>``, and histograms
    ``<role>/exponents/<layer>``."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Raise ``BackendUnavailable`` without the package tensorboard, ``ConfigError`` where
        ``folder`` cannot be made."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise BackendUnavailable("TensorBoardWriter needs the package tensorboard. Remedy: "
                                     f"{install_command('tensorboard')}") from error
        try:
            self._writer: Any = SummaryWriter(str(folder))
        except OSError as error:
            raise ConfigError(f"cannot write to the folder {str(folder)!r}: {error.strerror}. "
                              "Remedy: one that can be made, or is there") from error

    def write(self, measurement: Measurement) -> None:
        """Add a measurement, at its step."""
        for each in measurement.operands:
            for name in _NUMBERS:
                self._scalar(f"{each.role}/{name}/{each.layer}", getattr(each, name), measurement)
            if each.exponents:
                self._histogram(f"{each.role}/exponents/{each.layer}", each.exponents, measurement)
        for each in measurement.gradients:
            for name in ("cosine", "norm_ratio"):
                self._scalar(f"{_GRADIENT}/{name}/{each.parameter}", getattr(each, name),
                             measurement)
        self._writer.flush()

    def _scalar(self, tag: str, value: float | None, measurement: Measurement) -> None:
        if value is not None:
            self._writer.add_scalar(tag, value, measurement.step)

    def _histogram(self, tag: str, counts: Mapping[int, int], measurement: Measurement) -> None:
        """Bins of width 1, each about its exponent."""
        places = range(min(counts), max(counts) + 1)
        self._writer.add_histogram_raw(
            tag, min=places[0], max=places[-1], num=sum(counts.values()),
            sum=sum(at * count for at, count in counts.items()),
            sum_squares=sum(at * at * count for at, count in counts.items()),
            bucket_limits=[at + 0.5 for at in places],
            bucket_counts=[counts.get(at, 0) for at in places], global_step=measurement.step)

    def close(self) -> None:
        """Write what is left, and close the files."""
        self._writer.close()
