"""Files and folders that are whole or not there, whatever ends the process or the power.

What is written goes to another name on the same file system, is flushed to the disk, and takes its
own name by a rename. A folder that replaces one changes places with it, in one step where the
system can. What an interrupted process leaves beside the destination is hidden (``.name.purpose``),
found again by the next one, and deleted when that is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Generator
from pathlib import Path

logger = logging.getLogger(__name__)

_AT_FDCWD = -100  # linux/fcntl.h: paths are relative to the working folder
_RENAME_EXCHANGE = 2  # linux/fs.h
_TEMPORARY = ".tmp"


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename a file over another one, for good: its bytes are on the disk before its name is."""
    flush(source)
    os.replace(source, target)
    flush(target.parent)


def write(target: Path, data: bytes) -> None:
    """Let ``target`` hold ``data``: written to a file beside it, then renamed.

    Raises:
        OSError: ``target`` is then as it was.
    """
    _delete_abandoned(target)
    temporary, handle = _temporary(target)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _temporary(target: Path) -> tuple[Path, int]:
    """A new file beside ``target``, open and ours, with the permissions that new files get."""
    while True:
        path = target.parent / f".{target.name}.{secrets.token_hex(4)}{_TEMPORARY}"
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        try:
            ours = _lock(handle) and _is(path, handle)
        except OSError:  # the file system has no locks: nobody deletes what is abandoned
            return path, handle
        if ours:
            return path, handle
        os.close(handle)  # another process took it for abandoned


def _delete_abandoned(target: Path) -> None:
    """Delete what killed processes left of files that were to be ``target``."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}{re.escape(_TEMPORARY)}")
    with contextlib.suppress(OSError):  # they are in nobody's way
        for path in [path for path in target.parent.iterdir() if pattern.fullmatch(path.name)]:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _lock(handle):
                    path.unlink()
            finally:
                os.close(handle)


def install(folder: Path, target: Path) -> None:
    """Let ``folder``, whose files are on the disk, be ``target``; what was there is deleted.

    Raises:
        OSError: ``target`` is then as it was.
    """
    flush(folder)
    if not target.exists():
        os.replace(folder, target)
        flush(target.parent)
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        _lock(handle)  # while it is deleted, nobody takes it for what an interruption left
        old = folder if _exchange(folder, target) else _put_aside(folder, target)
        flush(target.parent)
        shutil.rmtree(old)
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Whether two folders changed places in one step; False where the system has none for it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the kernel or the file system
        return False
    raise OSError(code, os.strerror(code), str(second))


def _put_aside(folder: Path, target: Path) -> Path:
    """In two steps, between which ``target`` is missing; returns where the old one is now."""
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside)  # onto an empty folder
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(aside, target)
        raise
    return aside


def empty(folder: Path, but: Collection[str] = ()) -> None:
    """Delete everything in ``folder``, except files of the names in ``but``."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in but:
            path.unlink()


@contextlib.contextmanager
def scratch(
    target: Path, purpose: str, *, keep: bool = False, in_turn: bool = False
) -> Generator[Path]:
    """A folder beside ``target`` for this process alone, with what a killed one left in it.

    purpose: part of its hidden name. keep: an exception leaves it for the next process, as a kill
    does; else, and at the end, it is deleted. in_turn: wait while another has one for this target
    and purpose; else the next one is taken.

    Raises:
        OSError: where the parent folder cannot be written.
    """
    folder, handle = _claim(target.parent, f".{target.name}.{purpose}", in_turn)
    done = False
    try:
        yield folder
        done = True
    finally:
        keep = keep and not done and any(folder.iterdir())
        if not keep and _is(folder, handle):  # else it is installed
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _claim(parent: Path, name: str, in_turn: bool) -> tuple[Path, int]:
    """The first folder that no living process holds, and what holds it now.

    in_turn: the first folder, when no living process holds it any more.
    """
    for attempt in itertools.count(1):
        folder = parent / (name if attempt == 1 else f"{name}.{attempt}")
        while True:
            folder.mkdir(exist_ok=True)
            try:
                handle = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:  # its holder has just deleted it
                continue
            if not _lock(handle):
                if not in_turn:
                    os.close(handle)
                    break
                logger.warning("waiting for another writer, which holds %s", folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is(folder, handle):
                return folder, handle
            os.close(handle)
    raise AssertionError  # count() does not end


def _lock(handle: int) -> bool:
    """Whether an open file or folder is ours, until it is closed or this process ends."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
