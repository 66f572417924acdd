"""Compact list of the names of images, and the parts of a source that have one: files and members of archives."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from upstep_fast.data.sources.part import Part, printable, shown_suffix
from upstep_fast.data.sources.splits import is_split


@dataclass(frozen=True, eq=False)
class Names:
    """Relative paths, joined into one bytes object."""

    blob: bytes
    ends: np.ndarray  # [N] int64
    component: int | None  # index of the folder that is the class: 0, or 1 under train/ and test/; None: no classes
    under_split: bool = False  # whether the folder before the class must be a split

    @classmethod
    def pack(cls, names: Iterable[bytes], component: int | None = 0, under_split: bool = False) -> Names:
        """Pack relative paths with "/" between their components."""
        blob, ends = bytearray(), array("q")
        for name in names:
            blob += name
            ends.append(len(blob))
        packed = np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, np.int64)
        return cls(bytes(blob), packed, component, under_split)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.ends[index - 1] if index else 0 : self.ends[index]]

    def other_than(self, suffixes: tuple[bytes, ...]) -> list[int]:
        """Return the names that end in none of these suffixes, in lower case; a million take half a second."""
        blob, ends = self.blob.lower(), self.ends.tolist()
        return [i for i, (a, b) in enumerate(pairwise([0, *ends])) if not blob.endswith(suffixes, a, b)]

    def ending_in(self, suffixes: tuple[bytes, ...]) -> list[int]:
        """Return the names that end in one of these suffixes, in lower case."""
        blob = self.blob.lower()
        if not any(suffix in blob for suffix in suffixes):
            return []
        return [i for i, (a, b) in enumerate(pairwise([0, *self.ends.tolist()])) if blob.endswith(suffixes, a, b)]

    def suffixes(self) -> Counter[str]:
        """Return the number of names of each suffix; a million take a second."""
        blob, ends = self.blob, self.ends.tolist()
        # of a path's end only: for ".nii.gz" two dots count
        tails = Counter(blob[max(a, blob.rfind(b".", a, b - 3)) : b] for a, b in pairwise([0, *ends]))
        result: Counter[str] = Counter()
        for tail, count in tails.items():
            result[shown_suffix("x" + os.fsdecode(tail))] += count
        return result

    def labels(self) -> list[str] | None:
        """Return the class folder of each name; None if one has none, or if the only classes are names of splits."""
        known: dict[bytes, str] = {}
        labels = []
        for index in range(len(self)):
            if (folder := self._class_folder(index)) is None:
                return None
            labels.append(known.setdefault(folder, printable(folder)))
        return None if known and all(map(is_split, known.values())) else labels

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        first = next((i for i in range(len(self)) if self._class_folder(i) is None), None)
        if first is None:
            return f"({printable(self[0].split(b'/', 1)[0])}/ is a split, not a class) has images outside class folders"
        return f"({printable(self[first])}) has images outside class folders"

    def _class_folder(self, index: int) -> bytes | None:
        folders = self[index].split(b"/")[:-1]
        if self.component is None or len(folders) <= self.component:
            return None
        if self.under_split and not is_split(folders[self.component - 1].decode("latin-1")):
            return None
        return folders[self.component]


class NamedPart(Part):
    """Part whose images have a list of names."""

    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def file_name(self, index: int) -> str:
        """Return the relative path, or the member's name."""
        return os.fsdecode(self.names[index])

    def other_than(self, suffixes: tuple[bytes, ...]) -> list[int]:
        """Return the images whose names end in none of these suffixes."""
        return self.names.other_than(suffixes)

    def ending_in(self, suffixes: tuple[bytes, ...]) -> list[int]:
        """Return the images whose names end in one of these suffixes."""
        return self.names.ending_in(suffixes)

    def suffixes(self) -> Counter[str]:
        """Return the number of files of each suffix."""
        return self.names.suffixes()
