"""Memory that goes back to the system when it is freed."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Generator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LAST = 1 << 25  # bytes: what glibc raises the second one to at most


@contextmanager
def returned() -> Generator[None]:
    """In here, the heap does not grow for what has 1 MiB or more: that has pages of its own, which
    go back to the system with it.

    glibc raises that bound to the largest block freed so far. Tensors then lie on the heap, where
    what stays cuts up what is freed, and the process grows with every layer. Pages of their own are
    slow for what lives shortly: keep that smaller. The bound cannot be asked for: after, it is what
    glibc raises it to where large tensors are freed. Other C libraries have no ``mallopt``, nor
    such a bound.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    mallopt(_TRIM_THRESHOLD, _LAST)  # of the heap's end, which comes and goes with what is small
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _LAST)
        mallopt(_TRIM_THRESHOLD, 2 * _LAST)  # as glibc does
