"""Atomic file writes: a temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from upstep_fast.errors import ConfigError, RunFailedError

PROBE_BYTES = 4096  # a block: an empty file can be made on a full disk


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write `content` to `path` atomically and return `path`: a reader finds the old content or the new, never a part.

    content: bytes, or a function that writes them to the open file. Raises OSError; `path` then has its old content.
    """
    temporary = temporary_of(path)
    try:
        write_synced(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_synced(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write `content` to `path`, as in `write_atomic`, and force it to disk. Raises OSError."""
    with open(path, "wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def temporary_of(path: Path) -> Path:
    """Return the name beside `path` under which this process writes it."""
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk. Raises OSError."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def write_errors(what: object, cure: str) -> Iterator[None]:
    """Turn an OSError within the context into a RunFailedError of one line: the file, the reason, the cure.

    what: named where the system names no file.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunFailedError(f"out: cannot write {error.filename or what}: {reason}; {cure}") from error


def probe(folder: Path) -> None:
    """Write a small file to the folder, or to the nearest of its parents that exists, and remove it again.

    Raises OSError where the files of a command could not be written: no permission, read-only, full, over a quota.
    """
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    temporary = temporary_of(folder / "probe")
    try:
        with open(temporary, "wb") as file:
            file.write(bytes(PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_writable(path: Path, field: str) -> None:
    """Raise ConfigError, before slow work, if `write_atomic` could not write `path`.

    field: the flag that the message starts with.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{field}: no folder {path.parent}; make it, or give another path")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{field}: {path} is not a regular file; give another path")
    try:
        probe(path.parent)
    except OSError as error:
        raise ConfigError(f"{field}: cannot write {path}: {error.strerror or error}; give another path") from error


def write_together(folder: Path, files: Mapping[str, bytes], last: str) -> None:
    """Write files that are of use only together, by name, to an existing folder: never old and new ones with `last`.

    All are on disk under temporary names before an old one is touched; then the old `last`, without which readers
    refuse the folder, is removed, the others are replaced, and `last` comes last. Raises OSError.
    """
    paths = sorted((folder / name for name in files), key=lambda path: path.name == last)
    try:
        for path in paths:
            write_synced(temporary_of(path), files[path.name])
        (folder / last).unlink(missing_ok=True)
        for path in paths:
            os.replace(temporary_of(path), path)
        sync_folder(folder)
    finally:
        for path in paths:
            temporary_of(path).unlink(missing_ok=True)
