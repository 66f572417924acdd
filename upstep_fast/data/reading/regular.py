"""Parts of files that are read by offset, for formats with random access."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage

_handles = Recent(64)  # open files, closed when they are no longer among the latest
ZARR_METADATA = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
LARGE, MAX_RATIO = 64 << 20, 100  # no image of more bytes is stored or packed in less than a hundredth of them
Version = tuple[str, int, int, int]
T = TypeVar("T")


def version_of(path: str) -> Version:
    """Return what changes when a file is replaced: (path, size in bytes, inode, time of its last change).

    Raises OSError, also if it is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return path, status.st_size, status.st_ino, status.st_mtime_ns


def kept_header(kept: Recent, file: File, parse: Callable[[str | io.BytesIO, int], T], cost: Callable[[T], int]) -> T:
    """Return `parse(file, size in bytes)`; that of a path is kept in `kept` until the file is replaced.

    cost: bytes that a result takes. Raises as `parse`, OSError.
    """
    if not isinstance(file, str):
        return parse(io.BytesIO(file), len(file))
    key = version_of(file)

    def make() -> tuple[T, int]:
        parsed = parse(file, key[1])
        return parsed, cost(parsed)

    found: T = kept.get(key, make)
    return found


def is_zarr(path: str | bytes) -> bool:
    """Return whether a path is a Zarr store: a folder with metadata that ends in .zarr, one file for a listing."""
    place = os.fsdecode(path)
    return place.lower().endswith(".zarr") and any(os.path.isfile(os.path.join(place, name)) for name in ZARR_METADATA)


def read_at(file: File, offset: int, size: int) -> bytes | memoryview:
    """Return `size` bytes from `offset` on. Raises BadImage if the file ends before, OSError. Thread-safe."""
    if isinstance(file, str):
        handle: io.FileIO = _handles.get(version_of(file), lambda: (open_plain(file, buffering=0), 1))
        data: bytes | memoryview = os.pread(handle.fileno(), size, offset)
        while 0 < len(data) < size and (more := os.pread(handle.fileno(), size - len(data), offset + len(data))):
            data = bytes(data) + more  # one call gives at most 2 GB
    else:
        data = memoryview(file)[offset : offset + size]
    if len(data) != size:
        raise BadImage(f"truncated: {len(data)} of {size} bytes from {offset} on")
    return data


def open_plain(path: str | bytes, buffering: int = -1) -> Any:
    """Open a regular file to read bytes; a pipe that replaced it after it was listed does not block. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError("not a regular file")
    return open(fd, "rb", buffering=buffering)
