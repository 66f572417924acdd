"""Atomic file writes: a temporary file in the same folder, fsync, rename."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from upstep_fast.errors import ConfigError


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> Path:
    """Write `content` to `path` atomically and return `path`: a reader finds the old content or the new, never a part.

    content: bytes, or a function that writes them to the open file. Raises OSError; `path` then has its old content.
    """
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk. Raises OSError."""
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(path: Path, field: str) -> None:
    """Raise ConfigError, before slow work, if `write_atomic` could not write `path`.

    field: the flag that the message starts with.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{field}: no folder {path.parent}; make it, or give another path")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{field}: {path} is not a regular file; give another path")
    temporary = _temporary(path)
    try:
        temporary.touch()
    except OSError as error:
        raise ConfigError(f"{field}: cannot write {path}: {error.strerror or error}; give another path") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{os.getpid()}-{path.name}")
