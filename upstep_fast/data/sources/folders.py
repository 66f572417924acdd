"""Images in files: recursive folders, single files, and the files of a list."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from upstep_fast.data.decode.arrays import npy_header
from upstep_fast.data.reading.regular import is_zarr
from upstep_fast.data.sources.file_kinds import is_unnamed_dicom
from upstep_fast.data.sources.names import NamedPart, Names
from upstep_fast.data.sources.part import (
    ALREADY_LISTED,
    IMAGE_SUFFIXES,
    Listing,
    printable,
    read_image_file,
    read_start,
)
from upstep_fast.data.sources.tree import Children
from upstep_fast.errors import DataError


@dataclass(frozen=True, eq=False)
class Files(NamedPart):
    """Images in files, with names relative to `root` or absolute."""

    root: str
    names: Names
    classes: tuple[str, ...] | None = None  # given by a list, instead of by folders
    reason: str = ""  # why a list gives no classes

    def name(self, index: int) -> str:
        """Return a printable path."""
        return printable(os.fsencode(self._path(index)))

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        return read_image_file(self._path(index))

    def file_path(self, index: int) -> str | None:
        """Return the file's path."""
        return self._path(index)

    def start(self, index: int) -> bytes:
        """Return the file's first bytes. Raises OSError."""
        return read_start(self._path(index))

    def labels(self) -> list[str] | None:
        """Return the class of each image; None without classes."""
        return self.names.labels() if self.classes is None else list(self.classes)

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        return self.reason or self.names.unlabeled()

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the files' sizes, [N] int64; -1 for a missing one."""
        return np.array([_file_size(self._path(i)) for i in range(len(self))], dtype=np.int64)

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes."""
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield self.sizes_in_bytes().tobytes()

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


def top_folders(root: str) -> list[str]:
    """Return the names of the folders in `root`. Raises DataError if it cannot be read."""
    try:
        with os.scandir(os.fsencode(root)) as entries:
            folders = [e for e in entries if not e.name.startswith(b".") and _is(e.is_dir)]
            return [os.fsdecode(e.name) for e in folders if not is_zarr(e.path)]
    except OSError as error:
        raise DataError(f"data: cannot read the folder {root}: {error.strerror}") from error


def children(root: str) -> Children:
    """Return the function that gives the folders in a folder under `root`, and whether it holds images."""

    def of(folder: str) -> tuple[set[str], bool]:
        place = os.path.join(root, folder) if folder else root
        try:
            found = set(top_folders(place)) - {"__MACOSX"}
            with os.scandir(os.fsencode(place)) as entries:
                has_images = any(
                    e.name.lower().endswith(IMAGE_SUFFIXES) and e.name[:1] != b"." and not _is(e.is_dir)
                    for e in entries
                )
            return found, has_images
        except (OSError, DataError):
            if not folder:
                raise
            return set(), False  # `walk` says it

    return of


def walk(root: bytes, top: bytes, listing: Listing, suffixes: tuple[bytes, ...]) -> Iterator[bytes]:
    """Yield the files under root/top of these suffixes, sorted; each real folder once, so that loops of links end.

    What is left out goes to `listing`. Without recursion, as folders may lie deeper than Python's stack. Raises
    DataError if root/top cannot be read.
    """
    stack: list[Iterator[tuple[bytes, bool]]] = [iter([(top, True)])]
    while stack:
        path, is_folder = next(stack[-1], (None, False))
        if path is None:
            stack.pop()
        elif not is_folder:
            yield path
        else:
            try:
                stack.append(iter(_entries(root, path, listing, suffixes)))
            except OSError as error:
                where = printable(os.path.join(root, path))
                if path == top:
                    raise DataError(f"data: cannot read the folder {where}: {error.strerror}") from error
                listing.problems.append((where, f"the folder cannot be read: {error.strerror}"))


def _entries(root: bytes, folder: bytes, listing: Listing, suffixes: tuple[bytes, ...]) -> list[tuple[bytes, bool]]:
    """Return (path relative to root, whether it is a folder) of a folder's entries, sorted. Raises OSError."""
    place = os.path.join(root, folder)
    if not listing.is_new(os.stat(place)):
        listing.problems.append((printable(place), "a link to a folder that is already listed"))
        return []
    found: list[tuple[bytes, bool]] = []
    with os.scandir(place) as scanned:
        entries = {entry.name: entry for entry in scanned if not entry.name.startswith(b".")}  # .DS_Store, ._photo.jpg
    for name, entry in entries.items():
        if _is(entry.is_dir):
            found.append((name, not (suffixes is IMAGE_SUFFIXES and is_zarr(entry.path))))
        elif not name.lower().endswith(suffixes) and not (suffixes is IMAGE_SUFFIXES and _is_unnamed_dicom(entry)):
            listing.add_other(entry.path)
        elif reason := _why_not(entry, entries, listing):
            listing.problems.append((printable(entry.path), reason))
        else:
            found.append((name, False))
    found.sort()
    return [(folder + b"/" + name if folder else name, is_folder) for name, is_folder in found]


def _why_not(entry: os.DirEntry[bytes], beside: dict[bytes, os.DirEntry[bytes]], listing: Listing) -> str:
    """Return why a file with an image's suffix is none; empty if it is one."""
    if not _is(entry.is_file):
        return "a link to nothing" if entry.is_symlink() else "not a regular file"
    if entry.name.endswith(b".npy") and entry.name[:-4] + b".txt" in beside and is_features(entry.path):
        return "features that embed has written, no image"
    if listing.has_files and not listing.is_new(entry.stat()):
        return ALREADY_LISTED
    return ""


def _is_unnamed_dicom(entry: os.DirEntry[bytes]) -> bool:
    return is_unnamed_dicom(entry.name, lambda: read_start(entry.path))


def is_features(path: bytes) -> bool:
    """Return whether a .npy file holds floats [N, D]; images are of whole numbers."""
    try:
        with open(path, "rb") as file:
            shape, _, dtype = npy_header(file)  # type: ignore[arg-type]
    except (OSError, ValueError):
        return False
    return dtype.kind == "f" and len(shape) == 2


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
