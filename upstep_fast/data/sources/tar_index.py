"""Index of a tar file's members: names, offsets and sizes, from one pass over its headers. Nothing is extracted.

The headers are parsed by the standard library's tarfile, whose objects of about a kilobyte per member are not kept: a
shard can hold a million. Only regular files become members; everything else, and everything damaged, is returned as a
problem with its reason.
"""

from __future__ import annotations

import io
import os
import tarfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path

from upstep_fast.data.sources.part import MAX_BYTES, Problem, open_data, printable
from upstep_fast.errors import DataError

MAX_HEADER = 1 << 20  # bytes of a long name or pax header; real ones have hundreds

_CUT_OFF, _REST = "the tar file is cut off", "the rest of the file is not read"
_NAMES = ("utf-8", "surrogateescape")  # encoding of members' names: any bytes survive it
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}
_TYPES = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}


@dataclass
class TarIndex:
    """Members in the order of the file; names have NUL in place of "/", so that bytes sort as paths do."""

    names: list[bytes] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))  # bytes
    sizes: array = field(default_factory=lambda: array("q"))  # bytes
    problems: list[Problem] = field(default_factory=list)


class _AbsurdSizeError(Exception):
    """Size in a header that no real tar file has."""


class _Headers(io.BufferedReader):
    """File for tarfile, which reads headers only: refuses to read more than MAX_HEADER, whatever a header claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise _AbsurdSizeError
        return super().read(size)


def read_index(path: Path) -> TarIndex:
    """Return the index of a tar file. Raises DataError if it cannot be read, is compressed, or is no tar file."""
    index = TarIndex()
    try:
        with _Headers(open_data(path).detach()) as file:
            first = file.read(tarfile.BLOCKSIZE)
            for magic, kind in _COMPRESSED.items():
                if first.startswith(magic):
                    raise DataError(f"data: {path} is compressed ({kind}): its members have no offsets; decompress it")
            if first.strip(b"\0"):
                _check_header(first, path)
                _walk(file, os.fstat(file.fileno()).st_size, index)
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror}") from error
    return index


def _check_header(block: bytes, path: Path) -> None:
    try:
        tarfile.TarInfo.frombuf(block, *_NAMES)
    except Exception as error:  # tarfile raises many kinds on damaged headers
        raise DataError(f"data: {path} is not a tar file (bad header); give a folder, a .tar file or a list") from error


def _walk(file: _Headers, end: int, index: TarIndex) -> None:
    at = 0
    file.seek(at)
    try:
        tar = tarfile.TarFile("", fileobj=file, encoding=_NAMES[0], errors=_NAMES[1])
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]
            if member.size < 0 or tar.offset <= at:
                raise _AbsurdSizeError
            at = tar.offset
            name = member.name.encode(*_NAMES)
            missing = member.offset_data + member.size - end
            if _is_file(member) and missing > 0:
                left = member.size - missing
                reason = f"cut off: {member.size} bytes promised, {left} left in the tar"
                index.problems.append((printable(name), reason))
                return
            _add(member, name, index)
        problem = _problem_at(file, at, end)
    except OSError:
        raise
    except _AbsurdSizeError:
        problem = f"tar header of an absurd size; {_REST}"
    except Exception:  # tarfile raises many kinds on damaged headers
        problem = _CUT_OFF if file.tell() >= end else f"bad tar header; {_REST}"
    if problem:
        index.problems.append((f"byte {at}", problem))


def _add(member: tarfile.TarInfo, name: bytes, index: TarIndex) -> None:
    """Add a member to the index or to its problems; folders are neither."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if member.isdir() or (_is_file(member) and name.endswith(b"/")):
        return
    if member.issparse():
        reason = "sparse file, not a regular file"
    elif not _is_file(member):
        reason = f"{_TYPES.get(member.type, 'unknown kind of member')}, not a regular file"
    elif member.size > MAX_BYTES:
        reason = f"{member.size} bytes, above the limit of {MAX_BYTES}"
    elif b".." in parts or name.startswith(b"/"):
        reason = "its name leads out of the archive"
    else:
        index.names.append(b"\0".join(parts))
        index.offsets.append(member.offset_data)
        index.sizes.append(member.size)
        return
    index.problems.append((printable(name), reason))


def _is_file(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _problem_at(file: _Headers, at: int, end: int) -> str | None:
    """Return why tarfile stopped at this byte; None at the end of the archive."""
    if at > end or 0 < end - at < tarfile.BLOCKSIZE:
        return _CUT_OFF
    file.seek(at)
    return f"bad tar header; {_REST}" if file.read(tarfile.BLOCKSIZE).strip(b"\0") else None
