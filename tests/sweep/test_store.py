"""The file of a sweep: claims, what is renewed and given back, and what is refused."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scaleprop.errors import ConfigError
from scaleprop.sweeps import Sweep
from scaleprop.sweeps.runs import Outcome, Task
from scaleprop.sweeps.store import STALE, Store
from tests.sweep.tiny import BASE, run

TASK = Task("k", {}, BASE, 0)


def test_a_claim_is_one_processs_until_it_is_gone(tmp_path: Path):
    first, second = Store(tmp_path / "runs.sqlite"), Store(tmp_path / "runs.sqlite")
    assert first.claim(TASK) and not second.claim(TASK)
    assert first.outcomes()["k"].status == second.outcomes()["k"].status == "running"
    dead = f"{first.owner.split(' ')[0]} {_dead_pid()} x"
    _set(first, owner=dead)
    assert first.outcomes() == {}
    assert second.claim(TASK), "its process is gone"
    _set(first, owner="elsewhere 1 x")
    assert not first.claim(TASK), "another machine may be running it"
    _set(first, owner="elsewhere 1 x", renewed=time.time() - STALE - 1)
    assert first.claim(TASK), "nobody renewed it"
    first.close()
    assert second.outcomes() == {}, "what is closed claims nothing"
    assert second.claim(TASK)
    second.finish("k", Outcome("done", (1.0, math.nan), 2.0, 0.1))
    second.finish("k", Outcome("failed"))
    outcome = second.outcomes()["k"]
    assert outcome.status == "done" and outcome.loss == 2.0 and math.isnan(outcome.losses[1])
    assert not second.claim(TASK)
    second.close()


def _set(store: Store, **values: object) -> None:
    for name, value in {"renewed": time.time(), **values}.items():
        store._connection.execute(f"UPDATE runs SET {name} = ?", (value,))


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_claims_are_renewed_meanwhile(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("scaleprop.sweeps.store.RENEWED", 0.01)
    store = Store(tmp_path / "runs.sqlite")
    store.claim(TASK)
    _set(store, renewed=0.0)
    with store.renewing():
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            (renewed,) = store._connection.execute("SELECT renewed FROM runs").fetchone()
            if renewed > 0:
                break
            time.sleep(0.01)
    assert renewed == pytest.approx(time.time(), abs=11)
    store.close()


def test_a_fresh_start_does_not_take_from_a_running_one(tmp_path: Path):
    path = tmp_path / "runs.sqlite"
    other = Store(path)
    other.claim(TASK)
    with pytest.raises(ConfigError, match="another process is running this sweep"):
        run(path, fresh=True, axes={})
    other.close()
    assert len(run(path, fresh=True, axes={}).points) == 1


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    damaged = tmp_path / "damaged.sqlite"
    damaged.write_bytes(b"no database at all" * 100)
    with pytest.raises(ConfigError, match=r"cannot use .*damaged.*not a database"):
        run(damaged)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE t (x)")
    connection.close()
    for change in ({}, {"fresh": True}):
        with pytest.raises(ConfigError, match="a database, but of no sweep"):
            run(other, **change)
    path = tmp_path / "runs.sqlite"
    run(path, axes={}, baseline=None)
    newer = tmp_path / "newer.sqlite"
    Store(newer).close()
    with pytest.raises(ConfigError, match="no sweep was begun"):
        Sweep.load(newer)
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ConfigError, match="version 99; this scaleprop reads 1"):
        Sweep.load(newer)
    with pytest.raises(ConfigError, match=r"holds another sweep: steps 4, not 5\. Remedy: .*fresh"):
        run(path, steps=5)
    half = tmp_path / "half.sqlite"
    half.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot use"):
        run(half)


def test_paths_that_cannot_be_written_or_read(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot use .*unable to open"):
        run(tmp_path / "missing" / "runs.sqlite")
    with pytest.raises(ConfigError, match="cannot use"):
        run(tmp_path)
    with pytest.raises(ConfigError, match=r"no sweep .*Remedy: run one"):
        Sweep.load(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(ConfigError, match="cannot use"):
            run(locked / "runs.sqlite")


def test_a_file_in_a_folder_that_cannot_be_written_is_shown(tmp_path: Path, monkeypatch: Any):
    """Odd names included; SQLite would want to put files beside it."""
    path = tmp_path / "runs ?#%20.sqlite"
    run(path, axes={})
    monkeypatch.setattr("scaleprop.sweeps.store.os.access", lambda *_: False)
    opened: list[str] = []
    connect = sqlite3.connect
    monkeypatch.setattr("scaleprop.sweeps.store.sqlite3.connect",
                        lambda name, **k: opened.append(name) or connect(name, **k))
    assert Sweep.load(path).points[0].status([0]) == "1 of 1"
    assert opened[0].endswith("?immutable=1") and [*tmp_path.iterdir()] == [path]
