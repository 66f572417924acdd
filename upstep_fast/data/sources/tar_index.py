"""An index of a tar file's members, made in one pass over its headers. Nothing is ever extracted.

Python's tarfile keeps about a kilobyte a member; a shard can hold a million. Here a member costs its name and two
integers. Read: ustar, GNU (long names, base-256 sizes) and pax headers. Only regular files are members; everything
else, and everything that looks wrong, is returned as a problem with its reason.
Format: POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import os
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from upstep_fast.errors import DataError

BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of a long name or pax header; real ones have hundreds
MAX_MEMBER = 1 << 30  # bytes; a larger member is no image

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd", b"PK": "zip"}
_REGULAR = b"\x0007"  # NUL, 0 and 7: old, ordinary and contiguous files
_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "fifo",
    b"S": "sparse file",
}


@dataclass
class TarIndex:
    """Members in the order of the file: names with NUL for "/", so that bytes sort as paths do."""

    names: list[bytes] = field(default_factory=list)
    offsets: array = field(default_factory=lambda: array("q"))
    sizes: array = field(default_factory=lambda: array("q"))
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_index(path: Path) -> TarIndex:
    """Raise DataError if `path` cannot be read, is compressed, or does not start as a tar file does."""
    index = TarIndex()
    try:
        with open(path, "rb") as file:
            first = file.read(BLOCK)
            for magic, kind in _COMPRESSED.items():
                if first.startswith(magic):
                    raise DataError(f"data: {path} is compressed ({kind}): its members have no offsets; decompress it")
            if _size(first) is None and first.strip(b"\0"):
                raise DataError(f"data: {path} is not a tar file (bad header); give a folder, a .tar file or a list")
            _walk(file, os.fstat(file.fileno()).st_size, index)
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror}") from error
    return index


def read_at(file: BinaryIO, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on."""
    file.seek(offset)
    return file.read(size)


def _walk(file: BinaryIO, end: int, index: TarIndex) -> None:
    at, long_name = 0, None
    pax: dict[bytes, bytes] = {}
    while at + BLOCK <= end:
        header = read_at(file, at, BLOCK)
        if not header.strip(b"\0"):
            return
        size = _size(header)
        if size is None:
            index.problems.append((f"byte {at}", "bad tar header; the rest of the file is not read"))
            return
        kind = header[156:157]
        if kind == b"S":
            at += BLOCK * _sparse_headers(file, header, at)
        if kind in b"LKxg" and size <= MAX_HEADER:
            payload = read_at(file, at + BLOCK, size)
            if len(payload) == size and kind == b"L":
                long_name = payload.rstrip(b"\0")
            elif len(payload) == size and kind == b"x":
                pax = _pax(payload)
            at += BLOCK + _padded(size)
            continue
        name = long_name or pax.get(b"path") or _name(header)
        if b"size" in pax:
            size = int(pax[b"size"]) if pax[b"size"].isdigit() else -1
        reason = None
        if kind in b"LKxg" or size < 0:
            index.problems.append((_label(name), "tar header of an absurd size; the rest of the file is not read"))
            return
        if kind not in _REGULAR:
            reason = None if kind == b"5" else f"{_KINDS.get(kind, 'unknown kind of member')}, not a regular file"
        elif any(key.startswith(b"GNU.sparse") for key in pax):
            reason = "sparse file, not a regular file"
        elif at + BLOCK + size > end:
            index.problems.append((_label(name), f"cut off: {size} bytes promised, {end - at - BLOCK} left in the tar"))
            return
        elif size > MAX_MEMBER:
            reason = f"{size} bytes, above the limit of {MAX_MEMBER}"
        elif not name.endswith(b"/"):
            parts = [part for part in name.split(b"/") if part not in (b"", b".")]
            if b".." in parts or name.startswith(b"/"):
                reason = "its name leads out of the archive"
            else:
                index.names.append(b"\0".join(parts))
                index.offsets.append(at + BLOCK)
                index.sizes.append(size)
        if reason:
            index.problems.append((_label(name), reason))
        has_data = kind in _REGULAR + b"S"  # links and devices may state a size yet carry nothing
        at += BLOCK + (_padded(size) if has_data else 0)
        long_name, pax = None, {}
    if at > end or (at < end and end - at < BLOCK):
        index.problems.append((f"byte {at}", "the tar file is cut off"))


def _size(header: bytes) -> int | None:
    """The size field, or None when the header's checksum or numbers are wrong."""
    try:
        stored = int(header[148:156].strip(b" \0"), 8)
        # adler32's low half is 1 + sum of the bytes mod 65521: the checksum at C speed
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(header[148:156]) + 8 * 32
        if (total - stored) % 65521 != 0:
            return None
        if header[124] & 0x80:
            return int.from_bytes(header[125:136], "big")
        return int(header[124:136].strip(b" \0") or b"0", 8)
    except (ValueError, IndexError):
        return None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    # GNU's own magic has two blanks and other fields where ustar keeps the prefix
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax(payload: bytes) -> dict[bytes, bytes]:
    """Record "LENGTH key=value\\n"; what does not parse is left out."""
    records, at = {}, 0
    while at < len(payload):
        blank = payload.find(b" ", at, at + 12)
        if blank < 0 or not payload[at:blank].isdigit():
            break
        length = int(payload[at:blank])
        key, equals, value = payload[blank + 1 : at + length - 1].partition(b"=")
        if length <= blank - at or not equals:
            break
        records[key] = value
        at += length
    return records


def _sparse_headers(file: BinaryIO, header: bytes, at: int) -> int:
    """How many extension blocks follow an old GNU sparse header."""
    count, more = 0, header[482]
    while more:
        count += 1
        block = read_at(file, at + BLOCK * count, BLOCK)
        more = len(block) == BLOCK and block[504]
    return count


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _label(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
