"""Part of a source, the compact list of names that most parts hold, and what a source's paths hold besides images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Protocol

import numpy as np

from upstep_fast.data.formats.kinds import NO_READER, START, SUFFIXES, Kind, missing_of, suffix_of
from upstep_fast.data.reading.regular import LARGE, MAX_RATIO, open_plain
from upstep_fast.data.reading.stored import WHOLE, File, Layout, Piece
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.input_files import open_regular

IMAGE_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)
MAX_BYTES = 1 << 30  # of an encoded image; a larger file or member is none
ALREADY_LISTED = "already listed: the same file twice is counted once"

Problem = tuple[str, str]
Digest = tuple[int, bytes]  # size of the encoded image, BLAKE2b of 8 bytes


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; None: found by rule."""

    image: str | None = None  # of a CSV or hf: data set; of a tar, the suffix of an image after its key
    label: str | None = None


@dataclass(frozen=True)
class Item:
    """Image of a source before it is decoded."""

    file: File
    kind: Kind | None = None  # None: told from the bytes when they are decoded
    piece: Piece = WHOLE
    layout: Layout | None = None  # of the file, where it has a kind


class Part(Protocol):
    """Fixed sequence of encoded images: one folder, tar file, list or dataset of a source."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return a printable label."""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError if it cannot be read any more."""

    def labels(self) -> list[str] | None:
        """Return the class of each image; None when not all have one."""

    def unlabeled(self) -> str:
        """Return why `labels` is None, as the end of a sentence that starts with the data's path."""

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the size of each encoded image, [N] int64; -1 where it is not known."""

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes, for the source's fingerprint."""

    def file_name(self, index: int) -> str:
        """Return the name whose suffix tells the kind of the file."""
        return self.name(index)

    def other_than(self, suffixes: tuple[bytes, ...]) -> Sequence[int]:
        """Return the images whose names end in none of these suffixes, in lower case."""
        return [i for i in range(len(self)) if not os.fsencode(self.file_name(i)).lower().endswith(suffixes)]

    def ending_in(self, suffixes: tuple[bytes, ...]) -> Sequence[int]:
        """Return the images whose names end in one of these suffixes, in lower case."""
        return [i for i in range(len(self)) if os.fsencode(self.file_name(i)).lower().endswith(suffixes)]

    def suffixes(self) -> Counter[str]:
        """Return the number of files of each suffix."""
        return Counter(shown_suffix(self.file_name(i)) for i in range(len(self)))

    def file_path(self, index: int) -> str | None:
        """Return the path of an image that is a file of its own; None for another."""
        return None

    def start(self, index: int) -> bytes:
        """Return the first START bytes of the encoded image. Raises OSError."""
        return self.read(index)[:START]

    def item(self, index: int) -> Item:
        """Return the encoded image, and which picture of it is meant. Raises OSError."""
        return Item(self.read(index))

    def digest(self, index: int) -> Digest:
        """Return what two images share only if they are equal. Raises OSError."""
        data = self.read(index)
        return len(data), hashlib.blake2b(data, digest_size=8).digest()

    def groups(self) -> np.ndarray | None:
        """Return the number of each image's file, [N] int64; None if each image is a file of its own."""
        return None


@dataclass
class Listing:
    """What one call of `open_source` has met so far, besides the parts."""

    problems: list[Problem] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files of other kinds, by suffix
    examples: dict[str, str] = field(default_factory=dict)  # one path of each of them
    notes: list[str] = field(default_factory=list)  # which split or column is read
    without_test: list[str] = field(default_factory=list)  # what a path needs to have test images
    seen: set[tuple[int, int] | str] = field(default_factory=set)  # folders, files and data sets that are listed
    several: bool = False  # whether several paths were given, so that files may be met twice
    has_files: bool = False  # whether `seen` holds single files

    def add_other(self, path: bytes) -> None:
        """Count a file that is no image."""
        kind = shown_suffix(os.fsdecode(path))
        self.others[kind] += 1
        if kind not in self.examples:
            self.examples[kind] = printable(path)

    def add_note(self, note: str) -> None:
        """Add what is said beside the number of images; nothing if it is empty or said already."""
        if note and note not in self.notes:
            self.notes.append(note)

    def is_new(self, status: os.stat_result) -> bool:
        """Return whether a folder or file is met for the first time."""
        key = (status.st_dev, status.st_ino)
        is_new = key not in self.seen
        self.seen.add(key)
        return is_new

    def is_new_file(self, path: str) -> bool:
        """Return whether a file is met for the first time, alone or as one of a listed folder; a missing one is."""
        if not self.several:
            return True
        try:
            folder, file = os.stat(os.path.dirname(path) or "."), os.stat(path)
        except (OSError, ValueError):
            return True
        self.has_files = True
        is_in_folder = (folder.st_dev, folder.st_ino) in self.seen and path.lower().endswith(SUFFIXES)
        return self.is_new(file) and not is_in_folder

    def left_out(self) -> str:
        """Return the number of files of other kinds: "3 .heic (no reader), 12 .txt"; empty if there are none."""
        kinds = self.others.most_common(8)
        words = [f"{n:,} {kind}{_why_left_out(kind)}" for kind, n in kinds]
        if rest := self.others.total() - sum(n for _, n in kinds):
            words.append(f"{rest:,} of other kinds")
        return ", ".join(words)


def shown_suffix(name: str) -> str:
    """Return a name's suffix for messages; "without a suffix" without one, or where it is none."""
    suffix = suffix_of(name)
    return printable(os.fsencode(suffix)) if 1 < len(suffix) <= 12 and not suffix[1:].isdigit() else "without a suffix"


def _why_left_out(suffix: str) -> str:
    if suffix in NO_READER:
        return " (no reader)"
    return f" ({command})" if (command := missing_of(suffix)) else ""


def printable(name: bytes) -> str:
    """Return a label that can be encoded, for any bytes; control characters stay, as whoever prints it escapes them."""
    return name.decode("utf-8", "backslashreplace")


def open_data(path: str | Path) -> BufferedReader:
    """Open a regular file of the data. Raises DataError, without waiting for a pipe."""
    try:
        return open_regular(Path(path), "data")
    except ConfigError as error:
        raise DataError(str(error)) from error


def read_start(path: str | bytes) -> bytes:
    """Return the first START bytes of a regular file. Raises OSError, without waiting for a pipe."""
    with open_plain(path) as file:
        return bytes(file.read(START))


def read_image_file(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """Return `size` bytes of a regular file from `offset` on; by default all. Raises OSError, as transient ones are."""
    with open_plain(path) as file:  # buffered: one unbuffered read may return less than there is
        status = os.fstat(file.fileno())
        size = status.st_size if size is None else size
        if size > MAX_BYTES:  # a file that grew must not fill the memory
            raise OSError(
                f"{size} bytes, above the limit of {MAX_BYTES}; a TIFF or slide is read in tiles, by --tiles 224"
            )
        if size > LARGE and _is_hollow(status):
            raise OSError(f"{size} bytes of holes: its file of {status.st_size} bytes takes up next to nothing")
        file.seek(offset)
        data: bytes = file.read(size) or b""
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes could be read")
    return data


def _is_hollow(status: os.stat_result) -> bool:
    """Return whether a file takes up less than 1/100 of its size; 0 blocks: the file system does not say."""
    stored = 512 * getattr(status, "st_blocks", 0)
    return 0 < stored < status.st_size // MAX_RATIO
