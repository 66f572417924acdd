"""Subset of a source's images as a source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from upstep_fast.data.sources.part import Digest, Item, Part, Problem

if TYPE_CHECKING:
    from upstep_fast.data.sources.source import Source  # which imports this module


@dataclass(frozen=True, eq=False)
class Subset(Part):
    """Part that holds the images at `indices` of another source, in that order."""

    source: Source
    indices: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the image's label in the source."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        return self.source.read(int(self.indices[index]))

    def item(self, index: int) -> Item:
        """Return the encoded image, and which picture of it is meant. Raises OSError."""
        return self.source.item(int(self.indices[index]))

    def digest(self, index: int) -> Digest:
        """Return the digest in the source. Raises OSError."""
        return self.source.digest(int(self.indices[index]))

    def groups(self) -> np.ndarray | None:
        """Return the number of each image's file, [N] int64; None if each image is a file of its own."""
        groups = self.source.groups()
        return None if groups is None else groups[self.indices]

    def labels(self) -> list[str] | None:
        """Return the class of each image, or None when the source has no classes."""
        labels = self.source.labels
        return None if labels is None else [labels[i] for i in self.indices]

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        return self.source.unlabeled()

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the images' sizes, [N] int64; -1 where one is not known."""
        return self.source.sizes()[self.indices]

    def identity(self) -> Iterator[bytes]:
        """Yield the source's fingerprint and the indices, for the fingerprint of a source that holds this part."""
        yield self.source.fingerprint().encode()
        yield self.indices.tobytes()


def split_by_file(order: Sequence[int], groups: np.ndarray | None, num: int) -> tuple[list[int], list[int]]:
    """Split images into (`num` of them, the rest); of a file of several pictures all are on one side.

    order: a permutation of the images; its first ones are chosen. groups: as `Source.groups`. Files are taken in the
    order of their first image until they hold `num` images, never more than half of all; what is above `num` is in
    neither part. No file that is small enough gives no image.
    """
    if groups is None:
        return list(order[:num]), list(order[num:])
    sizes, chosen, count = np.bincount(groups), set(), 0
    for file in dict.fromkeys(groups[list(order)].tolist()):
        if count < num and 2 * (count + sizes[file]) <= len(order):
            chosen.add(file)
            count += sizes[file]
    is_chosen = np.isin(groups, list(chosen))
    return [i for i in order if is_chosen[i]][:num], [i for i in order if not is_chosen[i]]


def subset(source: Source, indices: Sequence[int] | np.ndarray, problems: Sequence[Problem] = ()) -> Source:
    """Return a source of the images at `indices` [N]; `problems` are added to those that skipped.csv lists."""
    part = Subset(source, np.asarray(indices, dtype=np.int64))
    return replace(source, parts=(part,), problems=(*source.problems, *problems))
