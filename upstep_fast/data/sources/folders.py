"""Images in files: recursive folders, single files, and the files of a list."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from upstep_fast.data.sources.part import IMAGE_SUFFIXES, MAX_BYTES, SPLITS, Names, Part, Problem, printable
from upstep_fast.errors import DataError


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, with names relative to `root` or absolute."""

    root: str
    names: Names
    classes: tuple[str, ...] | None = None  # given by a list, instead of by folders

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return a printable path."""
        return printable(os.fsencode(self._path(index)))

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        # a fifo that replaced a file after listing must not block, and a file that grew must not fill the memory
        fd = os.open(self._path(index), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(fd, "rb") as file:  # buffered: one unbuffered read may return less than there is
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size > MAX_BYTES:
                raise OSError(f"{status.st_size} bytes, above the limit of {MAX_BYTES}")
            return file.read(status.st_size) or b""

    def labels(self) -> list[str] | None:
        """Return the class of each image; None without classes."""
        return self.names.labels() if self.classes is None else list(self.classes)

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes."""
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield np.array([_file_size(self._path(i)) for i in range(len(self))], dtype=np.int64).tobytes()

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


def open_folder(root: str, split: str | None, problems: list[Problem]) -> list[Part]:
    """Return the part of all images under `root`, or of one split. Raises DataError if the folder cannot be read."""
    has_splits = all(os.path.isdir(os.path.join(root, s)) for s in SPLITS)
    if split == "test" and not has_splits:
        return []
    top = split.encode() if split and has_splits else b""
    seen: set[tuple[int, int]] = set()
    files = _walk(os.fsencode(root), top, seen, problems)
    return [Files(root, Names.pack(files, component=int(has_splits)))]


def _walk(root: bytes, folder: bytes, seen: set[tuple[int, int]], problems: list[Problem]) -> Iterator[bytes]:
    """Yield image files under root/folder in sorted order; each real folder once, so that loops of links end."""
    top = os.path.join(root, folder)
    try:
        status = os.stat(top)
        if (status.st_dev, status.st_ino) in seen:
            problems.append((printable(top), "a link to a folder that is already listed"))
            return
        seen.add((status.st_dev, status.st_ino))
        files, folders = [], set()
        with os.scandir(top) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):  # .DS_Store, ._photo.jpg, .git
                    continue
                if _is(entry.is_dir):
                    folders.add(entry.name)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    if _is(entry.is_file):
                        files.append(entry.name)
                    else:
                        reason = "a link to nothing" if entry.is_symlink() else "not a regular file"
                        problems.append((printable(entry.path), reason))
    except OSError as error:
        if not folder:
            raise DataError(f"data: cannot read the folder {printable(top)}: {error.strerror}") from error
        problems.append((printable(top), f"the folder cannot be read: {error.strerror}"))
        return
    files += folders
    files.sort()
    for name in files:
        path = folder + b"/" + name if folder else name
        if name in folders:
            yield from _walk(root, path, seen, problems)
        else:
            yield path


def _is(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a link to itself
        return False


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
