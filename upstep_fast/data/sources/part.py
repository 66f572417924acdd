"""Part of a source, and the compact list of names that most parts hold."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from upstep_fast.data.decode.image import SUFFIXES

IMAGE_SUFFIXES = tuple(suffix.encode() for suffix in SUFFIXES)
SPLITS = ("train", "test")
MAX_BYTES = 1 << 30  # of an encoded image; a larger file or member is none

Problem = tuple[str, str]


class Part(Protocol):
    """Fixed sequence of encoded images: one folder, tar file, list or dataset of a source."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return a printable label."""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError if it cannot be read any more."""

    def labels(self) -> list[str] | None:
        """Return the class of each image; None when not all have one."""

    def identity(self) -> Iterator[bytes]:
        """Yield names and sizes, for the source's fingerprint."""


@dataclass(frozen=True, eq=False)
class Names:
    """Relative paths, joined into one bytes object."""

    blob: bytes
    ends: np.ndarray  # [N] int64
    component: int | None  # index of the folder that is the class: 0, or 1 under train/ and test/; None: no classes

    @classmethod
    def pack(cls, names: Iterable[bytes], component: int | None = 0) -> Names:
        """Pack relative paths with "/" between their components."""
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
        """Return the class folder of each name; None if one has none."""
        if self.component is None:
            return None
        known: dict[bytes, str] = {}
        labels = []
        for index in range(len(self)):
            folders = self[index].split(b"/")[:-1]
            if len(folders) <= self.component or (self.component and folders[0].decode("latin-1") not in SPLITS):
                return None
            folder = folders[self.component]
            labels.append(known.setdefault(folder, printable(folder)))
        return labels


def printable(name: bytes) -> str:
    """Return a printable label for any bytes."""
    return name.decode("utf-8", "backslashreplace")
