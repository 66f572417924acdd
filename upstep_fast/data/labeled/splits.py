"""Labeled images: train and test splits, their classes, and a held-out part of train for model selection.

Of data without a test part a fraction of each class is held out: the images with the smallest hash of seed and name. So
the order of the files and the place of their folder do not matter, and new files move few of the others.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.sources.part import Columns
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.data.sources.splits import SPLITS
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import DataError, NoTestPartError

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

    def with_reading(self, reading: Reading) -> Labeled:
        """Return the images or clips, read in this way."""
        if isinstance(self.source, Source):
            return replace(self, source=replace(self.source, reading=reading))
        frames = self.source.source  # None: videos alone
        return (
            self
            if frames is None
            else replace(self, source=replace(self.source, source=replace(frames, reading=reading)))
        )


@dataclass(frozen=True)
class HeldOut:
    """The part of data without a test part that is held out for testing."""

    fraction: float = 0.0  # of each class; 0: such data is refused
    seed: int = 0


_NONE = HeldOut()


def train_and_test(
    paths: Sequence[str],
    command: str,
    columns: Columns = _ANY,
    without_test: HeldOut = _NONE,
    reading: Reading = AS_STORED,
) -> tuple[Labeled, Labeled]:
    """Return the train and test splits of `paths`, both with the classes of train.

    Raises DataError, naming the cure, for images without a class and classes of test/ that train/ lacks.
    """
    where = ", ".join(paths)
    try:
        test = open_source(paths, "test", columns, reading)
    except NoTestPartError:
        if not without_test.fraction:
            raise
        return _split(open_source(paths, columns=columns, reading=reading), paths, command, without_test)
    train = open_source(paths, "train", columns, reading)
    for split, source in zip(SPLITS, (train, test), strict=True):
        if source.labels is None:
            raise DataError(
                f"data: {where} {source.unlabeled()}; {command} needs {split}/CLASS/image files or a label for each"
            )
    return join(train, train.labels or [], test, test.labels or [], where)


def _split(source: Source, paths: Sequence[str], command: str, by: HeldOut) -> tuple[Labeled, Labeled]:
    """Return both parts of images without a test part. Raises DataError."""
    labels, where = source.labels, ", ".join(paths)
    if labels is None:
        raise DataError(
            f"data: {where} {source.unlabeled()}; {command} needs train/CLASS/image, CLASS/image or a label for each"
        )
    groups = source.groups()
    test = choose_test([source.name(i) for i in range(len(source))], labels, by, groups)
    classes = len(set(labels))
    if classes < 2 or not test.any():
        unit = "image" if groups is None else "file or series"
        what = f"one class, {labels[0]}" if classes < 2 else f"one {unit} of each class"
        raise DataError(f"data: {where} has {what}; {command} needs at least 2 classes, and 2 images of one")
    log.info("data: %s", source.summary)
    text = "data: %s has no test part: %g %% of each of %d classes held out, seed %d"
    log.info(text, where, 100 * by.fraction, classes, by.seed)
    y = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    whole = Labeled(source, y, tuple(sorted(set(labels))))
    return tuple(_counted(whole.subset(mask.nonzero()[:, 0])) for mask in (~test, test))  # type: ignore[return-value]


def _counted(part: Labeled) -> Labeled:
    return replace(part, source=replace(part.source, summary=f"{len(part.y):,} images"))


def choose_test(names: Sequence[str], labels: Sequence[str], by: HeldOut, groups: np.ndarray | None = None) -> Tensor:
    """Return a mask [N] over the images to hold out: `by.fraction` of each class, at least one and not all.

    A class of one image is for training. names: paths; what all begin with does not count. groups: number of each
    image's file or series, [N]; of its pictures all or none are held out, and the fraction is one of files.
    """
    files = np.arange(len(names)) if groups is None else _within_classes(groups, labels)
    first = dict(zip(reversed(files.tolist()), reversed(range(len(names))), strict=True))  # file -> its first image
    sizes = np.bincount(files, minlength=1)
    start = os.path.commonprefix(list(names)).rfind("/") + 1  # noqa: RUF071  (commonpath drops "./" and "//")
    members: dict[str, list[tuple[bytes, int]]] = {}
    for file, index in first.items():
        name = names[index][start:] if sizes[file] == 1 else names[index][start:].rpartition("#")[0]
        key = f"{by.seed} {name}".encode("utf-8", "backslashreplace")
        members.setdefault(labels[index], []).append((hashlib.sha256(key).digest(), file))
    mask = torch.zeros(len(names), dtype=torch.bool)
    for of_class in members.values():
        count = min(max(1, round(by.fraction * len(of_class))), len(of_class) - 1)
        mask[torch.from_numpy(np.isin(files, [file for _, file in sorted(of_class)[:count]]))] = True
    return mask


def join(
    train: Any, train_names: Sequence[str], test: Any, test_names: Sequence[str], where: str
) -> tuple[Labeled, Labeled]:
    """Return both splits with classes as indices into train's. Raises DataError for one class or those train lacks."""
    unknown = sorted(set(test_names) - set(train_names))
    if unknown:
        raise DataError(f"data: {where}: classes in test/ that train/ lacks: {', '.join(unknown[:5])}")
    classes = tuple(sorted(set(train_names)))
    if len(classes) < 2:
        raise DataError(f"data: {where}: train/ has one class, {classes[0]}; a classifier needs at least 2")
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


def _within_classes(groups: np.ndarray, labels: Any) -> np.ndarray:
    """Return numbers, [N], that two images share if they have one file or series, and one class."""
    classes = np.unique(np.asarray(labels), return_inverse=True)[1]
    return np.unique(classes * (int(groups.max(initial=0)) + 1) + groups, return_inverse=True)[1]


def held_out(y: Tensor, fraction: float, seed: int, groups: np.ndarray | None = None) -> Tensor:
    """Return a mask [N] over about `fraction` of each class, at most all but one of its images.

    y: [N] int64. groups: number of each image's file or series, [N]; of its pictures all or none are chosen, and not
    all files.
    """
    generator = torch.Generator().manual_seed(seed)
    files = torch.arange(len(y)) if groups is None else torch.from_numpy(_within_classes(groups, y.numpy()))
    mask = torch.zeros(len(y), dtype=torch.bool)
    for label in y.unique():
        members = files[y == label].unique()
        count = min(round(fraction * len(members)), len(members) - 1)
        mask |= torch.isin(files, members[torch.randperm(len(members), generator=generator)[:count]])
    return mask
