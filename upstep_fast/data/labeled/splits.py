"""Labeled images: train and test splits, their classes, and a held-out part of train for model selection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upstep_fast.data.sources.part import Columns
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.data.sources.splits import SPLITS
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import DataError

log = logging.getLogger("upstep_fast")
_ANY = Columns()


@dataclass(frozen=True)
class Labeled:
    """Images or clips with their classes."""

    source: Any  # Source, or Clips
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]

    def subset(self, indices: Tensor) -> Labeled:
        """Return the images or clips at `indices` [n] int64, in that order."""
        if isinstance(self.source, Source):
            source: Any = subset(self.source, indices.numpy())
        else:
            source = self.source.subset(indices.tolist())
        return Labeled(source, self.y[indices], self.classes)


def train_and_test(paths: Sequence[str], command: str, columns: Columns = _ANY) -> tuple[Labeled, Labeled]:
    """Return the train and test splits of `paths`, both with the classes of train.

    Raises DataError, naming the cure, for images without a class and classes of test/ that train/ lacks.
    """
    where = ", ".join(paths)
    train, test = (open_source(paths, split, columns) for split in SPLITS)
    for split, source in zip(SPLITS, (train, test), strict=True):
        if source.labels is None:
            raise DataError(
                f"data: {where} {source.unlabeled()}; {command} needs {split}/CLASS/image files or a label for each"
            )
    return join(train, train.labels or [], test, test.labels or [], where)


def join(
    train: Any, train_names: Sequence[str], test: Any, test_names: Sequence[str], where: str
) -> tuple[Labeled, Labeled]:
    """Return both splits with classes as indices into train's. Raises DataError for classes that train lacks."""
    unknown = sorted(set(test_names) - set(train_names))
    if unknown:
        raise DataError(f"data: {where}: classes in test/ that train/ lacks: {', '.join(unknown[:5])}")
    classes = tuple(sorted(set(train_names)))
    index = {name: i for i, name in enumerate(classes)}
    y_train, y_test = (torch.tensor([index[name] for name in names]) for names in (train_names, test_names))
    return Labeled(train, y_train, classes), Labeled(test, y_test, classes)


def log_splits(train: Labeled, test: Labeled, copies: tuple[int, int] | None) -> None:
    """Log what the splits hold and what scores on `test` cannot say. copies: (of training images, looked at)."""
    for name, part in zip(SPLITS, (train, test), strict=True):
        log.info("data: %s: %s", name, part.source.summary)
    if copies:
        text = "data: %d of %d test images looked at are training images too: scores will be too high; leave them out"
        log.warning(text, *copies)
    if absent := sorted(set(test.classes) - {test.classes[i] for i in test.y.tolist()}):
        log.warning("data: classes of train/ that test/ lacks, so they are not measured: %s", ", ".join(absent[:5]))


def held_out(y: Tensor, fraction: float, seed: int) -> Tensor:
    """Return a mask [N] over about `fraction` of each class, at most all but one of its images. y: [N] int64."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        members = (y == label).nonzero().flatten()
        count = min(round(fraction * len(members)), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask
