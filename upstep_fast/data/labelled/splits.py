"""Labelled images: the two splits of a tree, their classes, and a part of train that is held out to choose on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import DataError


@dataclass(frozen=True)
class Labelled:
    """Images or clips, and the classes they belong to."""

    source: Any  # Source, or Clips
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]

    def take(self, indices: Tensor) -> Labelled:
        """Some of them, in this order. indices: [n] int64."""
        if isinstance(self.source, Source):
            source: Any = Source((Chosen(self.source, tuple(indices.tolist())),), self.source.problems)
        else:
            source = self.source.take(indices.tolist())
        return Labelled(source, self.y[indices], self.classes)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some images of a source, as a part of another."""

    source: Source
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """As the source has it."""
        return self.source.name(self.indices[index])

    def read(self, index: int) -> bytes:
        """The encoded image. Raises OSError."""
        return self.source.read(self.indices[index])

    def labels(self) -> list[str] | None:
        """The classes of the chosen images."""
        found = self.source.labels
        return None if found is None else [found[i] for i in self.indices]

    def identity(self) -> Iterator[bytes]:
        """The source's names and sizes, and which were chosen."""
        yield self.source.fingerprint().encode()
        yield np.array(self.indices, dtype=np.int64).tobytes()


def train_and_test(paths: Sequence[str], command: str) -> tuple[Labelled, Labelled]:
    """The two splits of `paths`, with the classes of train.

    Raises DataError, naming the cure, for images outside class folders and classes of test/ that train/ lacks.
    """
    where = ", ".join(paths)
    train, test = (open_source(paths, split=split) for split in ("train", "test"))
    for split, source in (("train", train), ("test", test)):
        if source.labels is None:
            raise DataError(
                f"data: {where} has images outside class folders; {command} needs {split}/CLASS/image files"
            )
    return join(train, train.labels or [], test, test.labels or [], where)


def join(
    train: Any, train_names: Sequence[str], test: Any, test_names: Sequence[str], where: str
) -> tuple[Labelled, Labelled]:
    """Both splits with the classes of train as numbers. Raises DataError for a class of test that train lacks."""
    unknown = sorted(set(test_names) - set(train_names))
    if unknown:
        raise DataError(f"data: {where}: classes in test/ that train/ lacks: {', '.join(unknown[:5])}")
    classes = tuple(sorted(set(train_names)))
    index = {name: i for i, name in enumerate(classes)}
    y_train, y_test = (torch.tensor([index[name] for name in names]) for names in (train_names, test_names))
    return Labelled(train, y_train, classes), Labelled(test, y_test, classes)


def held_out(y: Tensor, fraction: float, seed: int) -> Tensor:
    """A mask over about this fraction of every class; at least one image of each stays. y: [N] int64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        take = min(round(fraction * len(members)), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:take]]] = True
    return mask
