"""Images in zip files: stored members are read by offset, deflated ones inflated one by one; nothing is extracted.

A zip is read as the folder that it was made from: its folders are splits and classes. Names are those that an unpacked
folder has: UTF-8 where the zip says so or its bytes are, code page 437 of those written under DOS and Windows.
"""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from upstep_fast.data.formats.kinds import START
from upstep_fast.data.reading.regular import LARGE, MAX_RATIO
from upstep_fast.data.sources.archives import Members, choose_split, last_of_each_name, opened
from upstep_fast.data.sources.file_kinds import is_unnamed_dicom
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import (
    IMAGE_SUFFIXES,
    MAX_BYTES,
    Listing,
    Part,
    Problem,
    open_data,
    printable,
    read_image_file,
)
from upstep_fast.data.sources.tree import Tree
from upstep_fast.errors import DataError

_LOCAL = struct.Struct("<4s2xH18xHH")  # signature, flags, lengths of the name and of the extra field
_ENCRYPTED, _UTF8, _UNIX = 0x41, 0x800, 3  # flags, and a system that a zip was made on
_METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "zstd", 95: "xz", 97: "WavPack"}


@dataclass
class ZipIndex:
    """Members in the order of the file's directory; names have NUL in place of "/"."""

    names: list[bytes] = field(default_factory=list)
    headers: array = field(default_factory=lambda: array("q"))  # offsets of local headers, bytes
    packed: array = field(default_factory=lambda: array("q"))  # sizes in the file, bytes
    sizes: array = field(default_factory=lambda: array("q"))  # bytes
    checksums: array = field(default_factory=lambda: array("q"))  # CRC-32
    deflated: array = field(default_factory=lambda: array("b"))
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class ZipMembers(Members):
    """Images in a zip file."""

    path: str
    names: Names
    headers: np.ndarray  # [N] int64, offsets of local headers, bytes
    packed: np.ndarray  # [N] int64, sizes in the file, bytes
    sizes: np.ndarray  # [N] int64, bytes
    checksums: np.ndarray  # [N] int64, CRC-32
    deflated: np.ndarray  # [N] bool
    address: str = ""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError, also for a wrong checksum."""
        size = int(self.sizes[index])
        data = self._content(index, int(self.packed[index]), size)
        if len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes could be unpacked")
        if zlib.crc32(data) != self.checksums[index]:
            raise OSError("its checksum in the zip file is another")
        return data

    def start(self, index: int) -> bytes:
        """Return the member's first bytes. Raises OSError."""
        size = int(self.packed[index])
        return self._content(index, size if self.deflated[index] else min(size, START), START)[:START]

    def _content(self, index: int, packed: int, size: int) -> bytes:
        return _read_member(self.path, int(self.headers[index]), packed, size, bool(self.deflated[index]))

    def labels(self) -> list[str] | None:
        """Return the class folder of each image; None without classes."""
        return self.names.labels()

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        return self.names.unlabeled()


def open_zips(paths: list[str], split: str | None, listing: Listing, folder: str = "") -> list[Part]:
    """Return one part per zip file; splits are looked for over all of them together. Raises DataError.

    folder: in the zip files, whose members alone are read, with names relative to it; empty: all.
    """
    indexes = opened(paths, read_index, listing)
    indexes = {path: _members_in(folder, index) if folder else index for path, index in indexes.items()}
    if (tree := choose_split({path: index.names for path, index in indexes.items()}, split, listing)) is None:
        return []
    return [_part(path, index, tree, listing) for path, index in indexes.items()]


def _members_in(folder: str, index: ZipIndex) -> ZipIndex:
    """Return the index of a folder's members, with names relative to it."""
    prefix = os.fsencode(folder.strip("/")).replace(b"/", b"\0") + b"\0"
    chosen = [i for i, name in enumerate(index.names) if name.startswith(prefix)]
    columns = ("headers", "packed", "sizes", "checksums", "deflated")
    arrays = {name: getattr(index, name) for name in columns}
    kept = {name: array(values.typecode, [values[i] for i in chosen]) for name, values in arrays.items()}
    return ZipIndex([index.names[i][len(prefix) :] for i in chosen], **kept, problems=index.problems)


def _part(path: str, index: ZipIndex, tree: Tree, listing: Listing) -> ZipMembers:
    listing.problems += [(f"{printable(os.fsencode(path))}/{name}", reason) for name, reason in index.problems]
    images = []
    for i in last_of_each_name(path, index.names, tree, listing):
        if _is_image(path, index, i):
            images.append(i)
        else:
            listing.add_other(index.names[i].replace(b"\0", b"/"))
    relative = (index.names[i].replace(b"\0", b"/") for i in images)
    names = Names.pack(relative, tree.component, tree.under_split)
    columns = (index.headers, index.packed, index.sizes, index.checksums, index.deflated)
    headers, packed, sizes, checksums, deflated = (np.array(column, np.int64)[images] for column in columns)
    return ZipMembers(path, names, headers, packed, sizes, checksums, deflated.astype(bool))


def _is_image(path: str, index: ZipIndex, i: int) -> bool:
    name = index.names[i].rpartition(b"\0")[2]
    if name.lower().endswith(IMAGE_SUFFIXES):
        return True
    where = index.headers[i], index.packed[i], START, bool(index.deflated[i])
    return is_unnamed_dicom(name, lambda: _read_member(path, *where))


def read_index(path: Path) -> ZipIndex:
    """Return the index of a zip file. Raises DataError if it cannot be read."""
    index = ZipIndex()
    try:
        with open_data(path) as file, zipfile.ZipFile(file) as archive:
            end = os.fstat(file.fileno()).st_size
            for member in archive.infolist():
                _add(member, end, index)
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises many kinds for damaged directories
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, zipfile.BadZipFile) else str(error)
        raise DataError(f"data: {path} is no zip file, or is cut off ({reason}); copy it again") from error
    return index


def _add(member: zipfile.ZipInfo, end: int, index: ZipIndex) -> None:
    """Add a member to the index or to its problems; folders and hidden ones are neither."""
    raw = _name(member)
    parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
    if raw.endswith(b"/") or any(part.startswith(b".") and part != b".." for part in parts):
        return
    if reason := _why_not(member, raw, parts, end):
        index.problems.append((printable(raw), reason))
        return
    index.names.append(b"\0".join(parts))
    index.headers.append(member.header_offset)
    index.packed.append(member.compress_size)
    index.sizes.append(member.file_size)
    index.checksums.append(member.CRC)
    index.deflated.append(member.compress_type == zipfile.ZIP_DEFLATED)


def _why_not(member: zipfile.ZipInfo, raw: bytes, parts: list[bytes], end: int) -> str:
    """Return why a member cannot be read; empty if it can."""
    kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == _UNIX else 0
    if kind not in (0, stat.S_IFREG):
        return "symbolic link, not a regular file" if kind == stat.S_IFLNK else "not a regular file"
    if b".." in parts or raw.startswith(b"/") or raw[1:3] == b":/":
        return "its name leads out of the archive"
    if b"\0" in raw or not parts:
        return "its name is empty or holds a NUL byte"
    if member.flag_bits & _ENCRYPTED:
        return "encrypted; unpack the zip file and give the folder"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = _METHODS.get(member.compress_type, f"method {member.compress_type}")
        return f"compressed by {method}: stored and deflated members are read; unpack the zip file and give the folder"
    if member.file_size > MAX_BYTES:
        return f"{member.file_size} bytes, above the limit of {MAX_BYTES}"
    if member.file_size > max(LARGE, MAX_RATIO * member.compress_size):
        return f"{member.file_size} bytes packed into {member.compress_size}: no image is as empty as that"
    if member.compress_type == zipfile.ZIP_STORED and member.file_size != member.compress_size:
        return f"stored, with {member.compress_size} bytes for {member.file_size}"
    if not 0 <= member.header_offset <= end - member.compress_size:
        return "cut off: its bytes lie beyond the end of the zip file"
    return ""


def _name(member: zipfile.ZipInfo) -> bytes:
    """Return a member's name as an unpacked folder has it, with "/" between its components."""
    name = member.orig_filename
    if member.flag_bits & _UTF8:
        raw = name.encode("utf-8", "surrogateescape")
    else:
        raw = name.encode("cp437")  # the bytes in the file
        if member.create_system != _UNIX and not _is_utf8(raw):
            raw = name.encode()
    return raw.replace(b"\\", b"/") if member.create_system != _UNIX and b"/" not in raw else raw


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_member(path: str, header: int, packed: int, size: int, deflated: bool) -> bytes:
    """Return at most `size` bytes of a member. header: offset of its local header. Raises OSError."""
    signature, flags, name, extra = _LOCAL.unpack(read_image_file(path, header, _LOCAL.size))
    if signature != b"PK\3\4" or flags & _ENCRYPTED:
        raise OSError("its header in the zip file is damaged")
    data = read_image_file(path, header + _LOCAL.size + name + extra, packed)
    if not deflated:
        return data
    try:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        return inflater.decompress(data, size + 1)  # one more byte: more than was declared is refused
    except zlib.error as error:
        raise OSError(f"cannot be unpacked: {error}") from error
