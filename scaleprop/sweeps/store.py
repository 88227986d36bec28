"""Runs in one SQLite file, a row each, that several processes may write and any may resume.

A run is claimed before it starts. The claim says whose it is and is renewed every few seconds; that
of a process that is gone counts for nothing, so what a killed sweep had in progress is done again.
The file is in WAL mode, which needs a local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaleprop.errors import ConfigError
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.sweeps.axes import digest
from scaleprop.sweeps.runs import Outcome, Task

SCHEMA_VERSION = 1
APPLICATION = 0x53505357  # of scaleprop's sweeps, in SQLite's header
STALE = 60.0  # seconds after which a claim that is not renewed is no longer one
RENEWED = 5.0
_PATIENCE = 60.0  # seconds to wait for another process that is writing
_TABLES = """
CREATE TABLE sweep (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    settings TEXT NOT NULL,         -- JSON: what all runs share
    plan TEXT NOT NULL              -- JSON: the grid that was asked for last
) STRICT;
CREATE TABLE runs (
    key TEXT PRIMARY KEY,           -- of settings, recipe and seed
    axes TEXT NOT NULL,             -- JSON: axis → label
    recipe TEXT NOT NULL,           -- JSON
    seed INTEGER NOT NULL,
    status TEXT NOT NULL,           -- running, done, diverged, failed
    losses TEXT,                    -- JSON: of every step
    validation REAL,
    seconds_per_step REAL,
    error TEXT,
    owner TEXT NOT NULL,            -- host, process, claim
    renewed REAL NOT NULL           -- seconds since 1970
) STRICT;
"""


class Store:
    """An open file of runs; ``path=None`` keeps them in memory. Safe to use from threads."""

    def __init__(self, path: str | os.PathLike[str] | None, *, write: bool = True) -> None:
        """Raises:
            ConfigError: where there is no such file, it cannot be opened, or it is of another kind.
        """
        self.path = None if path is None else Path(path)
        self.owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        self._lock = threading.RLock()
        self._claimed = False
        if self.path is not None and not write and not self.path.is_file():
            raise ConfigError(f"no sweep {str(self.path)!r}. Remedy: run one with this path")
        with self._named_errors():
            self._connection = sqlite3.connect(
                _name(self.path, write), timeout=_PATIENCE, isolation_level=None,
                check_same_thread=False, uri=True)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application == APPLICATION and version == SCHEMA_VERSION:
            return
        if application == APPLICATION:
            raise ConfigError(f"{self.path} is a sweep of version {version}; this scaleprop reads "
                              f"{SCHEMA_VERSION}. Remedy: another path")
        if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ConfigError(f"{self.path} is a database, but of no sweep. Remedy: another path")
        self._connection.execute("PRAGMA journal_mode = WAL")
        with self._transaction():  # another process may have been first
            if not self._connection.execute("PRAGMA application_id").fetchone()[0]:
                for statement in _TABLES.split(";\n")[:-1]:
                    self._connection.execute(statement)
                self._connection.execute(f"PRAGMA application_id = {APPLICATION}")
                self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Give back what is claimed, and close."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            if self._claimed:
                self._connection.execute("DELETE FROM runs WHERE owner = ? AND status = 'running'",
                                         (self.owner,))
        self._connection.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"cannot use {str(self.path)!r} for a sweep: {error}. Remedy: a path that can be "
                "written, on a local disk, and is no other file") from error

    @contextlib.contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """All or nothing, and nobody else in between."""
        with self._lock, self._named_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def begin(self, identity: Mapping[str, Any], plan: Any, *, fresh: bool) -> None:
        """Say what is to be run.

        fresh: forget all runs.

        Raises:
            ConfigError: where the file's runs are of another model, data or length, or, if
                ``fresh``, in progress.
        """
        with self._transaction() as connection:
            if fresh:
                self._forget(connection)
            found = connection.execute("SELECT settings FROM sweep").fetchone()
            if found is not None:
                _check_same(self.path, json.loads(found[0]), identity)
            connection.execute("INSERT OR REPLACE INTO sweep VALUES (1, ?, ?)",
                               (json.dumps(identity), json.dumps(plan)))

    def _forget(self, connection: sqlite3.Connection) -> None:
        claims = connection.execute(
            "SELECT owner, renewed FROM runs WHERE status = 'running'").fetchall()
        if any(self._is_alive(*claim) for claim in claims):
            raise ConfigError(f"{self.path}: another process is running this sweep, which a fresh "
                              "one would take from it. Remedy: another path, or wait for it")
        connection.execute("DELETE FROM runs")
        connection.execute("DELETE FROM sweep")

    def stored(self) -> tuple[dict[str, Any], Any]:
        """Settings and plan.

        Raises:
            ConfigError: where nothing was begun.
        """
        with self._lock, self._named_errors():
            found = self._connection.execute("SELECT settings, plan FROM sweep").fetchone()
        if found is None:
            raise ConfigError(f"{self.path}: no sweep was begun in it")
        return json.loads(found[0]), json.loads(found[1])

    def claim(self, task: Task) -> bool:
        """Whether ``task`` is now ours to run: not finished, and nobody else's."""
        with self._transaction() as connection:
            found = connection.execute("SELECT status, owner, renewed FROM runs WHERE key = ?",
                                       (task.key,)).fetchone()
            if found is not None and found[0] in ("done", "diverged"):
                return False
            if found is not None and found[0] == "running" and self._is_alive(*found[1:]):
                return False
            connection.execute(
                "INSERT OR REPLACE INTO runs (key, axes, recipe, seed, status, owner, renewed)"
                " VALUES (?, ?, ?, ?, 'running', ?, ?)",
                (task.key, json.dumps(dict(task.axes)), json.dumps(task.recipe.to_dict()),
                 task.seed, self.owner, time.time()))
        self._claimed = True
        return True

    def finish(self, key: str, outcome: Outcome) -> None:
        """Keep what a run gave."""
        losses = [loss if math.isfinite(loss) else None for loss in outcome.losses]
        with self._transaction() as connection:
            connection.execute(
                "UPDATE runs SET status = ?, losses = ?, validation = ?, seconds_per_step = ?,"
                " error = ?, renewed = ? WHERE key = ? AND status NOT IN ('done', 'diverged')",
                (outcome.status, json.dumps(losses), outcome.validation,
                 outcome.seconds_per_step, outcome.error, time.time(), key))

    def outcomes(self) -> dict[str, Outcome]:
        """Key → what its run gave, or that it is running."""
        with self._lock, self._named_errors():
            rows = self._connection.execute(
                "SELECT key, status, losses, validation, seconds_per_step, error, owner, renewed"
                " FROM runs").fetchall()
        return {key: Outcome(status, _losses(losses), validation, seconds, error or "")
                for key, status, losses, validation, seconds, error, *claim in rows
                if status != "running" or claim[0] == self.owner or self._is_alive(*claim)}

    @contextlib.contextmanager
    def renewing(self) -> Generator[None]:
        """Keep claims alive meanwhile, however long a run takes."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(RENEWED):
                with contextlib.suppress(ConfigError), self._transaction() as connection:
                    connection.execute(
                        "UPDATE runs SET renewed = ? WHERE owner = ? AND status = 'running'",
                        (time.time(), self.owner))

        thread = threading.Thread(target=renew, name="scaleprop-sweep-claims", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _is_alive(self, owner: str, renewed: float) -> bool:
        """Whether a claim's process still has it."""
        host, pid, _ = owner.split(" ")
        if owner == self.owner or time.time() - renewed > STALE:
            return False
        return host != socket.gethostname() or _runs(int(pid))


def _name(path: Path | None, write: bool) -> str:
    """What SQLite opens: in a folder that cannot be written, where nobody adds to it, as it is."""
    if path is None:
        return ":memory:"
    name = path.absolute().as_uri()
    still = not write and not os.access(path.parent, os.W_OK)
    return f"{name}?immutable=1" if still and not Path(f"{path}-wal").exists() else name


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _losses(stored: str | None) -> tuple[float, ...]:
    return tuple(math.nan if loss is None else loss for loss in json.loads(stored or "[]"))


def _check_same(
    path: Path | None, stored: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Raise ``ConfigError`` naming what differs."""
    differ = [f"{name} {stored.get(name)!r}, not {asked.get(name)!r}"
              for name in sorted({*stored, *asked}) if stored.get(name) != asked.get(name)]
    if differ:
        raise ConfigError(f"{path} holds another sweep: {'; '.join(differ)}. Remedy: another path, "
                          "or fresh=True (--fresh) to forget its runs")


def key_of(identity: Mapping[str, Any], recipe: TrainingRecipe, seed: int) -> str:
    """What tells runs apart."""
    parts: Sequence[Any] = (identity, digest(recipe), seed)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
