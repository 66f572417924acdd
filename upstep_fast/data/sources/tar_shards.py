"""Images in tar files, webdataset shards among them: read by offset, never extracted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upstep_fast.data.sources.part import IMAGE_SUFFIXES, SPLITS, Names, Part, Problem, printable
from upstep_fast.data.sources.tar_index import TarIndex, read_index


@dataclass(frozen=True, eq=False)
class TarMembers:
    """Images in a tar file, read by offset; the members' names are labels only."""

    path: str
    names: Names
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes
    classes: tuple[str, ...] | None = None  # from .cls members, as webdataset writes them

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Return a printable path."""
        return f"{printable(os.fsencode(self.path))}/{printable(self.names[index])}"

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        return _read_at(self.path, int(self.offsets[index]), int(self.sizes[index]))

    def labels(self) -> list[str] | None:
        """Return the class of each image; None without classes."""
        return self.names.labels() if self.classes is None else list(self.classes)

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes."""
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield self.sizes.tobytes()


def open_tars(paths: list[str], split: str | None, problems: list[Problem]) -> list[Part]:
    """Return one part per tar file; train/ and test/ are looked for over all of them together. Raises DataError."""
    indexes = [read_index(Path(path)) for path in paths]
    tops = {name.split(b"\0", 1)[0] for index in indexes for name in index.names if b"\0" in name}
    has_splits = all(s.encode() in tops for s in SPLITS)
    if split == "test" and not has_splits:
        return []
    prefix = split.encode() + b"\0" if split and has_splits else b""
    return [_part(path, index, prefix, has_splits, problems) for path, index in zip(paths, indexes, strict=True)]


def _part(path: str, index: TarIndex, prefix: bytes, has_splits: bool, problems: list[Problem]) -> Part:
    names, label = index.names, printable(os.fsencode(path))
    problems += [(f"{label}/{name}", reason) for name, reason in index.problems]
    members: list[int] = []
    for i in sorted(range(len(names)), key=names.__getitem__):
        if not _is_image(names[i], prefix):
            continue
        if members and names[members[-1]] == names[i]:  # as tar does: the last member of a name counts
            name = printable(names[i].replace(b"\0", b"/"))
            problems.append((f"{label}/{name}", "replaced by a later member of that name"))
            members.pop()
        members.append(i)
    packed = Names.pack((names[i].replace(b"\0", b"/") for i in members), component=int(has_splits))
    offsets, sizes = (np.array(a, dtype=np.int64)[members] for a in (index.offsets, index.sizes))
    return TarMembers(path, packed, offsets, sizes, _webdataset_classes(path, index, members))


def _is_image(name: bytes, prefix: bytes) -> bool:
    is_hidden = name.rsplit(b"\0", 1)[-1].startswith(b".")
    return name.startswith(prefix) and name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden


def _webdataset_classes(path: str, index: TarIndex, members: list[int]) -> tuple[str, ...] | None:
    """Return webdataset's labels, or None unless all members have one.

    KEY.cls holds the label of KEY.jpg; KEY is the name up to its first dot.
    """
    names, offsets, sizes = index.names, index.offsets, index.sizes
    labels = {_key(name): i for i, name in enumerate(names) if name.endswith(b".cls") and sizes[i] <= 256}
    if not labels or any(_key(names[i]) not in labels for i in members):
        return None
    of_members = (labels[_key(names[i])] for i in members)
    return tuple(printable(_read_at(path, offsets[i], sizes[i]).strip()) for i in of_members)


def _key(name: bytes) -> bytes:
    folder, nul, base = name.rpartition(b"\0")
    return folder + nul + base.split(b".", 1)[0]


def _read_at(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:  # buffered: one unbuffered read may return less than there is
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes could be read")
    return data
