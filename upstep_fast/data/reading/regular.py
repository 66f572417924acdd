"""Parts of files that are read by offset, for formats with random access."""

from __future__ import annotations

import os
import stat

from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage

Version = tuple[str, int, int, int]


def version_of(path: str) -> Version:
    """Return what changes when a file is replaced: (path, size in bytes, inode, time of its last change).

    Raises OSError, also if it is not a regular file.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")
    return path, status.st_size, status.st_ino, status.st_mtime_ns


def read_at(file: File, offset: int, size: int) -> bytes | memoryview:
    """Return `size` bytes from `offset` on. Raises BadImage if the file ends before, OSError."""
    if isinstance(file, str):
        # a pipe that replaced the file after it was listed must not block
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb", buffering=0) as opened:
            opened.seek(offset)
            data: bytes | memoryview = opened.read(size) or b""
            while 0 < len(data) < size and (more := opened.read(size - len(data))):  # one read gives at most 2 GB
                data = bytes(data) + more
    else:
        data = memoryview(file)[offset : offset + size]
    if len(data) != size:
        raise BadImage(f"truncated: {len(data)} of {size} bytes from {offset} on")
    return data
