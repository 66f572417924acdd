"""Where images come from: folders, lists, tar shards, Hugging Face datasets. Lists names, reads bytes, decodes nothing.

A PATH is a folder (read recursively), an image, a text or CSV list, a .tar file, a pattern of them
(`shards-{000..031}.tar`, `*.tar`), or `hf:NAME`. A tree that holds both `train/` and `test/` at its top has these two
splits; the class of an image is the folder directly under the split, or under the top where there are no splits.

Order: sorted by path, component by component, as bytes; a folder and a tar of it give the same order.
Memory: a million files take their names, joined into one bytes object, and 8 bytes each.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import DataError as DataError
from .tar import MAX_MEMBER, read_at, read_index

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".avif", ".npy")
SPLITS = ("train", "test")

Problem = tuple[str, str]
log = logging.getLogger(__name__)
_SUFFIXES = tuple(s.encode() for s in IMAGE_SUFFIXES)


class Part(Protocol):
    """One folder, tar file, list or data set of a source."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...
    def labels(self) -> list[str] | None: ...
    def identity(self) -> Iterator[bytes]: ...


@dataclass(frozen=True, eq=False)
class Source:
    """A fixed sequence of encoded images. Thread-safe, and small to send to another process."""

    parts: tuple[Part, ...]
    problems: tuple[Problem, ...] = ()  # (name, reason) of what was found but cannot be used

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    def name(self, index: int) -> str:
        """Path, or tar file and member, of an image: a label, printable whatever the bytes of the name are."""
        part, local = self._locate(index)
        return part.name(local)

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError if it cannot be read any more."""
        part, local = self._locate(index)
        return part.read(local)

    @cached_property
    def labels(self) -> list[str] | None:
        """The class of every image, or None when not all of them lie in class folders."""
        found = [part.labels() for part in self.parts]
        if any(labels is None for labels in found):
            return None
        return [label for labels in found if labels is not None for label in labels]

    def fingerprint(self) -> str:
        """SHA-256 over names and sizes, in order; where the data lies does not matter."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(f"{len(part)};".encode())
            for piece in part.identity():
                digest.update(piece)
        return digest.hexdigest()

    def _locate(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"source: index {index} of {len(self)} images")
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[which], index - (self._ends[which - 1] if which else 0)


@dataclass(frozen=True, eq=False)
class Names:
    """Many relative paths in one bytes object; `component` says which folder of each is its class."""

    blob: bytes
    ends: np.ndarray  # [N] int64
    component: int  # 0: directly under the top; 1: under train/ or test/

    @classmethod
    def pack(cls, names: Iterable[bytes], component: int = 0) -> Names:
        """Packs relative paths with "/" between their components."""
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name
            ends.append(len(blob))
        return cls(bytes(blob), np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, np.int64), component)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.ends[index - 1] if index else 0 : self.ends[index]]

    def labels(self) -> list[str] | None:
        """The class folder of each name; None if one has none."""
        known: dict[bytes, str] = {}
        labels = []
        for index in range(len(self)):
            folders = self[index].split(b"/")[:-1]
            if len(folders) <= self.component or (self.component and folders[0].decode("latin-1") not in SPLITS):
                return None
            folder = folders[self.component]
            labels.append(known.setdefault(folder, _printable(folder)))
        return labels


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files; names are relative to `root`, or absolute."""

    root: str
    names: Names
    classes: tuple[str, ...] | None = None  # given by a list, instead of by folders

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return _printable(os.fsencode(self._path(index)))

    def read(self, index: int) -> bytes:
        # a fifo that took a file's place after listing must not block, nor a file that grew fill the memory
        fd = os.open(self._path(index), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(fd, "rb", buffering=0) as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size > MAX_MEMBER:
                raise OSError(f"{status.st_size} bytes, above the limit of {MAX_MEMBER}")
            return file.read(status.st_size) or b""

    def labels(self) -> list[str] | None:
        return self.names.labels() if self.classes is None else list(self.classes)

    def identity(self) -> Iterator[bytes]:
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield np.array([_file_size(self._path(i)) for i in range(len(self))], dtype=np.int64).tobytes()

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index]))


@dataclass(frozen=True, eq=False)
class TarMembers:
    """Images in a tar file, read by their offset; the member's name is a label only."""

    path: str
    names: Names
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes
    classes: tuple[str, ...] | None = None  # from .cls members, as webdataset writes them

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{_printable(os.fsencode(self.path))}/{_printable(self.names[index])}"

    def read(self, index: int) -> bytes:
        return _read_at(self.path, int(self.offsets[index]), int(self.sizes[index]))

    def labels(self) -> list[str] | None:
        return self.names.labels() if self.classes is None else list(self.classes)

    def identity(self) -> Iterator[bytes]:
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield self.sizes.tobytes()


def open_source(paths: str | Path | Sequence[str | Path], split: str | None = None) -> Source:
    """Lists the images of one or more PATHs.

    split: "train" or "test" takes that part of every tree that has both; of a tree without them "train" takes all and
    "test" nothing; None takes all. Raises DataError, naming the path and the cure, when there is nothing to use.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"split: got {split!r}, must be None, {' or '.join(map(repr, SPLITS))}")
    paths = (paths,) if isinstance(paths, (str, Path)) else tuple(paths)
    if not paths:
        raise DataError("data: no path given; give a folder, a .tar file, a list or hf:NAME")
    parts: list[Part] = []
    problems: list[Problem] = []
    for path in paths:
        parts += _open(str(path), split, problems)
    source = Source(tuple(parts), tuple(problems))
    if len(source) == 0:
        where = ", ".join(map(str, paths))
        if split == "test":
            raise DataError(f"data: no test images in {where}; it must hold train/CLASS/... and test/CLASS/...")
        found = f"; the first of {len(problems)} problems: {problems[0][0]}: {problems[0][1]}" if problems else ""
        raise DataError(f"data: no images in {where}; looked for files ending in {' '.join(IMAGE_SUFFIXES)}{found}")
    for name, reason in problems[:5]:
        log.warning("data: left out %s: %s", name, reason)
    if len(problems) > 5:
        log.warning("data: left out %d more; skipped.csv lists them", len(problems) - 5)
    return source


def _open(path: str, split: str | None, problems: list[Problem]) -> list[Part]:
    if path.startswith("hf:"):
        from .huggingface import open_dataset

        return open_dataset(path.removeprefix("hf:"), split)
    if "://" in path or path.startswith("pipe:"):
        raise DataError(f"data: {path} is an address, only local files are read; download it first")
    if os.path.isdir(path):
        return _folder(path, split, problems)
    matches = [path] if os.path.exists(path) else _expand(path)
    if not matches:
        raise DataError(f"data: no file or folder at {path}")
    if all(match.lower().endswith(".tar") for match in matches):
        return _tars(matches, split, problems)
    return [part for match in matches for part in _single(match, split, problems)]


def _single(path: str, split: str | None, problems: list[Problem]) -> list[Part]:
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return _folder(path, split, problems)
    if suffix in (".txt", ".lst", ".csv", ".tsv"):
        from .lists import read_list

        return [read_list(Path(path))] if split != "test" else []
    if suffix in IMAGE_SUFFIXES:
        return (
            [Files(os.path.dirname(path), Names.pack([os.fsencode(os.path.basename(path))]))] if split != "test" else []
        )
    return _tars([path], split, problems)


def _folder(root: str, split: str | None, problems: list[Problem]) -> list[Part]:
    has_splits = all(os.path.isdir(os.path.join(root, s)) for s in SPLITS)
    if split == "test" and not has_splits:
        return []
    top = split.encode() if split and has_splits else b""
    seen: set[tuple[int, int]] = set()
    files = _walk(os.fsencode(root), top, seen, problems)
    return [Files(root, Names.pack(files, component=int(has_splits)))]


def _walk(root: bytes, folder: bytes, seen: set[tuple[int, int]], problems: list[Problem]) -> Iterator[bytes]:
    """Image files under root/folder in sorted order. Each real folder is read once, so loops of links end."""
    here = os.path.join(root, folder)
    try:
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            problems.append((_printable(here), "a link to a folder that is already listed"))
            return
        seen.add((status.st_dev, status.st_ino))
        files, folders = [], set()
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):  # .DS_Store, ._photo.jpg, .git
                    continue
                if entry.is_dir():
                    folders.add(entry.name)
                elif entry.name.lower().endswith(_SUFFIXES):
                    if entry.is_file():
                        files.append(entry.name)
                    else:
                        reason = "a link to nothing" if entry.is_symlink() else "not a regular file"
                        problems.append((_printable(entry.path), reason))
    except OSError as error:
        if not folder:
            raise DataError(f"data: cannot read the folder {_printable(here)}: {error.strerror}") from error
        problems.append((_printable(here), f"the folder cannot be read: {error.strerror}"))
        return
    files += folders
    files.sort()
    for name in files:
        path = folder + b"/" + name if folder else name
        if name in folders:
            yield from _walk(root, path, seen, problems)
        else:
            yield path


def _tars(paths: list[str], split: str | None, problems: list[Problem]) -> list[Part]:
    """One part a tar file; train/ and test/ are looked for over all of them together."""
    indexes = [read_index(Path(path)) for path in paths]
    tops = {name.split(b"\0", 1)[0] for index in indexes for name in index.names if b"\0" in name}
    has_splits = all(s.encode() in tops for s in SPLITS)
    if split == "test" and not has_splits:
        return []
    prefix = split.encode() + b"\0" if split and has_splits else b""
    parts: list[Part] = []
    for path, index in zip(paths, indexes, strict=True):
        problems += [(f"{_printable(os.fsencode(path))}/{name}", reason) for name, reason in index.problems]
        names = index.names
        chosen: list[int] = []
        for i in sorted(range(len(names)), key=names.__getitem__):
            if not names[i].startswith(prefix) or not names[i].lower().endswith(_SUFFIXES):
                continue
            if names[i].rsplit(b"\0", 1)[-1].startswith(b"."):
                continue
            if (
                chosen and names[chosen[-1]] == names[i]
            ):  # as tar does: the last member of a name is the one that counts
                label = _printable(names[i].replace(b"\0", b"/"))
                problems.append((f"{_printable(os.fsencode(path))}/{label}", "replaced by a later member of that name"))
                chosen.pop()
            chosen.append(i)
        packed = Names.pack((names[i].replace(b"\0", b"/") for i in chosen), component=int(has_splits))
        offsets, sizes = (np.array(a, dtype=np.int64)[chosen] for a in (index.offsets, index.sizes))
        classes = _cls_members(path, index.names, index.offsets, index.sizes, chosen)
        parts.append(TarMembers(path, packed, offsets, sizes, classes))
    return parts


def _cls_members(
    path: str, names: list[bytes], offsets: array, sizes: array, chosen: list[int]
) -> tuple[str, ...] | None:
    """webdataset's labels: KEY.cls beside KEY.jpg, KEY being the name up to its first dot. None unless all have one."""
    keys = {_key(name): i for i, name in enumerate(names) if name.endswith(b".cls") and sizes[i] <= 256}
    if not keys or any(_key(names[i]) not in keys for i in chosen):
        return None
    found = (keys[_key(names[i])] for i in chosen)
    return tuple(_printable(_read_at(path, offsets[i], sizes[i]).strip()) for i in found)


def _key(name: bytes) -> bytes:
    folder, nul, base = name.rpartition(b"\0")
    return folder + nul + base.split(b".", 1)[0]


def _expand(pattern: str) -> list[str]:
    """{a,b} and {000..031}, then * ? [ ] ; sorted within each alternative."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
        if span:
            words = [str(n).zfill(len(span[1])) for n in range(int(span[1]), int(span[2]) + 1)]
        else:
            words = brace[1].split(",")
        return [p for word in words for p in _expand(pattern[: brace.start()] + word + pattern[brace.end() :])]
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern))
    if not os.path.exists(pattern):
        raise DataError(f"data: no file or folder at {pattern}")
    return [pattern]


def _read_at(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = read_at(file, offset, size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes could be read")
    return data


def _file_size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
