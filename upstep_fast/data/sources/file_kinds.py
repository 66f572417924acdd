"""Kinds of the files of a part, told from names and first bytes, and TIFFs that hold stacks from their headers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial

from upstep_fast.config.reading import Reading
from upstep_fast.data.formats import animations, kinds
from upstep_fast.data.formats.kinds import Kind
from upstep_fast.data.reading.regular import is_zarr, read_at
from upstep_fast.data.reading.stored import File
from upstep_fast.data.sources.part import Digest, Part

_PHOTOGRAPHS = tuple(suffix.encode() for suffix in kinds.PHOTOGRAPHS)
_TIFF = (b".tif", b".tiff")
_OME = (b".ome.tif", b".ome.tiff")
MAX_HEADERS = 1000  # TIFFs of a part that are all looked at
MAX_CHUNKS, HASHED = 4096, 64  # files of an OME-Zarr folder that its digest is made of
SAMPLE = 32  # of more TIFFs


def kinds_in(part: Part, reading: Reading) -> list[Kind | None]:
    """Return the kind of each file, None for photographs; their starts are read only where the name does not tell.

    Where tiles or levels are asked for, each file has a kind.
    """
    result: list[Kind | None] = [None] * len(part)
    for index in range(len(part)) if reading.is_windowed else part.other_than(_PHOTOGRAPHS):
        if part.file_name(index).lower().endswith(".zarr") and is_zarr(part.file_path(index) or ""):
            result[index] = kinds.ZARR
            continue
        with contextlib.suppress(OSError):  # whoever decodes the image says why
            start = part.start(index)
            kind = kinds.kind_of(part.file_name(index), start)
            result[index] = kinds.windowed(kind, start, partial(file_of, part, index)) if reading.is_windowed else kind
    if not reading.is_windowed:
        for index in _stacks(part, reading):
            result[index] = kinds.STACKS
        for index in part.ending_in(animations.SUFFIXES) if reading.slices != "auto" else ():
            with contextlib.suppress(OSError):  # as above
                if animations.is_animation(file_of(part, index)):
                    result[index] = kinds.ANIMATIONS
    return result


def _stacks(part: Part, reading: Reading) -> list[int]:
    """Return the TIFFs that hold stacks.

    All are looked at where the name, --axes or --slice say so, or where there are at most MAX_HEADERS; of more TIFFs
    a sample, and all if one of it is a stack.
    """
    tiffs = part.ending_in(_TIFF)
    chosen = reading.axes is not None or reading.slices != "auto"
    any_pages = reading.axes is not None

    def stacks_of(indices: Sequence[int]) -> list[int]:
        return [index for index in indices if _kind_of_stack(part, index, any_pages)]

    if len(tiffs) <= MAX_HEADERS or chosen or stacks_of(tiffs[:: len(tiffs) // SAMPLE]):
        return stacks_of(tiffs)
    return stacks_of(part.ending_in(_OME))


def _kind_of_stack(part: Part, index: int, any_pages: bool) -> Kind | None:
    try:
        return kinds.stack_of(file_of(part, index), any_pages)
    except OSError:  # whoever decodes the image says why
        return None


def file_of(part: Part, index: int) -> File:
    """Return the path of a file of its own, or the content of another. Raises OSError."""
    path = part.file_path(index)
    return part.read(index) if path is None else in_place(path)


def in_place(path: str) -> str:
    """Return the path of a regular file or of an OME-Zarr folder. Raises OSError for another."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not is_zarr(path):
        raise OSError("not a regular file")
    return path


def digest_of_folder(path: str) -> Digest:
    """Return size and hash of an OME-Zarr folder: names and sizes of its files, and the start of the first ones.

    Of a folder of more than MAX_CHUNKS files the first ones count. Raises OSError.
    """
    digest, total, count = hashlib.blake2b(digest_size=8), 0, 0
    for place, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(place, name)
            size = os.path.getsize(file) if os.path.isfile(file) else 0
            digest.update(f"{os.path.relpath(file, path)}:{size}\n".encode(errors="surrogateescape"))
            if count < HASHED and size:
                digest.update(read_at(file, 0, min(size, 1 << 16)))
            total, count = total + size, count + 1
            if count == MAX_CHUNKS:
                return total, digest.digest()
    return total, digest.digest()


def may_be_unnamed_dicom(name: bytes) -> bool:
    """Return whether a name has no suffix, or the end of a UID as one, as files of DICOM have it."""
    suffix = os.path.splitext(name)[1][1:]
    return not suffix or suffix.isdigit()


def is_unnamed_dicom(name: bytes, start: Callable[[], bytes]) -> bool:
    """Return whether a file without a suffix, or with the end of a UID as one, holds DICOM. start: its first bytes."""
    if not may_be_unnamed_dicom(name):
        return False
    try:
        return kinds.kind_of("", start()) is kinds.DICOM
    except OSError:
        return False
