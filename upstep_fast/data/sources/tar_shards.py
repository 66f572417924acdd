"""Images in tar files: webdataset shards or any other tar, read by offset, never extracted."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upstep_fast.data.sources.part import IMAGE_SUFFIXES, SPLITS, Names, Part, Problem, printable
from upstep_fast.data.sources.tar_index import read_index


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
        """A printable path."""
        return f"{printable(os.fsencode(self.path))}/{printable(self.names[index])}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""
        return _read_at(self.path, int(self.offsets[index]), int(self.sizes[index]))

    def labels(self) -> list[str] | None:
        """Classes of all images, or None."""
        return self.names.labels() if self.classes is None else list(self.classes)

    def identity(self) -> Iterator[bytes]:
        """Names and sizes."""
        yield self.names.blob
        yield self.names.ends.tobytes()
        yield self.sizes.tobytes()


def open_tars(paths: list[str], split: str | None, problems: list[Problem]) -> list[Part]:
    """One part a tar file; train/ and test/ are looked for over all of them together."""
    indexes = [read_index(Path(path)) for path in paths]
    tops = {name.split(b"\0", 1)[0] for index in indexes for name in index.names if b"\0" in name}
    has_splits = all(s.encode() in tops for s in SPLITS)
    if split == "test" and not has_splits:
        return []
    prefix = split.encode() + b"\0" if split and has_splits else b""
    parts: list[Part] = []
    for path, index in zip(paths, indexes, strict=True):
        problems += [(f"{printable(os.fsencode(path))}/{name}", reason) for name, reason in index.problems]
        names = index.names
        chosen: list[int] = []
        for i in sorted(range(len(names)), key=names.__getitem__):
            if not names[i].startswith(prefix) or not names[i].lower().endswith(IMAGE_SUFFIXES):
                continue
            if names[i].rsplit(b"\0", 1)[-1].startswith(b"."):
                continue
            if (
                chosen and names[chosen[-1]] == names[i]
            ):  # as tar does: the last member of a name is the one that counts
                label = printable(names[i].replace(b"\0", b"/"))
                problems.append((f"{printable(os.fsencode(path))}/{label}", "replaced by a later member of that name"))
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
    """Webdataset's labels: KEY.cls beside KEY.jpg, KEY being the name up to its first dot. None unless all have one."""
    keys = {_key(name): i for i, name in enumerate(names) if name.endswith(b".cls") and sizes[i] <= 256}
    if not keys or any(_key(names[i]) not in keys for i in chosen):
        return None
    found = (keys[_key(names[i])] for i in chosen)
    return tuple(printable(_read_at(path, offsets[i], sizes[i]).strip()) for i in found)


def _key(name: bytes) -> bytes:
    folder, nul, base = name.rpartition(b"\0")
    return folder + nul + base.split(b".", 1)[0]


def _read_at(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes could be read")
    return data
