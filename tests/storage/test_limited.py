"""A model of three times the address space that is left for it, compiled under ``ulimit -v``."""

from __future__ import annotations

from pathlib import Path

from benchmarks.larger_than_memory import Shape, compile_limited, differences, write_model

ROOM = 96 << 20  # bytes above what the same compilation of next to nothing takes


def written(shape: Shape, folder: Path) -> Path:
    folder.mkdir()
    write_model(shape, folder)
    return folder


def test_three_times_the_room(tmp_path: Path) -> None:
    small = written(Shape(128, 1, vocabulary=64), tmp_path / "small")
    taken = compile_limited(small, tmp_path / "out", "fp8-weight", 1 << 36).peak_vm
    shape = Shape.of(3 * ROOM, 1024, vocabulary=1024)
    source = written(shape, tmp_path / "large")
    assert shape.nbytes >= 3 * ROOM
    run = compile_limited(source, tmp_path / "out", "fp8-weight", taken + ROOM)
    assert run.peak_vm <= taken + ROOM
    names, wrong = differences(source, tmp_path / "out", "fp8-weight")
    assert names and not wrong
