"""One part of a source, and the compact list of names that most parts hold."""

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
    """One folder, tar file, list or data set of a source: a fixed sequence of encoded images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A printable label."""

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError if it cannot be read any more."""

    def labels(self) -> list[str] | None:
        """The class of every image; None when not all have one."""

    def identity(self) -> Iterator[bytes]:
        """Names and sizes, for the source's fingerprint."""


@dataclass(frozen=True, eq=False)
class Names:
    """Many relative paths in one bytes object; `component` says which folder of each is its class."""

    blob: bytes
    ends: np.ndarray  # [N] int64
    component: int | None  # 0: directly under the top; 1: under train/ or test/; None: no classes

    @classmethod
    def pack(cls, names: Iterable[bytes], component: int | None = 0) -> Names:
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
    """A label for any bytes."""
    return name.decode("utf-8", "backslashreplace")
