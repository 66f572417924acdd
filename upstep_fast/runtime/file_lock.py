"""Locks of files: one writer at a time; the system releases a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from upstep_fast.errors import ConfigError


@contextlib.contextmanager
def locked(path: Path, in_use: str | None) -> Iterator[None]:
    """Hold the lock of the file `path` within the context.

    If another process holds it, ConfigError is raised with the message `in_use`; None: it is waited for. Raises OSError
    if the file cannot be written.
    """
    lock = FileLock(path, fallback_to_soft=False)  # a lock file that a killed process leaves must not count
    try:
        lock.acquire(timeout=-1 if in_use is None else 0)
    except Timeout:  # an OSError too
        raise ConfigError(in_use or "") from None
    try:
        yield
    finally:
        lock.release()
