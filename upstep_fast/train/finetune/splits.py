"""Labeled data of a run of fine-tuning, and what its size does to the configuration."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from upstep_fast.config.base import reading_of
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.labeled.clips import train_and_test_clips
from upstep_fast.data.labeled.copies import copies
from upstep_fast.data.labeled.splits import HeldOut, Labeled, held_out, train_and_test
from upstep_fast.data.sources.source import Source, columns_of
from upstep_fast.errors import DataError

log = logging.getLogger("upstep_fast")

LR = {"losa": 3e-3, "lora": 6e-3, "linear": 1e-2, "full": 2e-4}


@dataclass(frozen=True)
class Splits:
    """Labeled data of a run."""

    learn: Labeled
    choose: Labeled  # held out of train/; chooses the epoch
    test: Labeled
    copies: tuple[int, int] | None  # test images found to be training images too, and those looked at


def read_splits(config: FinetuneConfig) -> Splits:
    """Return the labeled data of a run. Raises DataError."""
    reading = reading_of(config.data)
    if config.frames is None:
        without_test = HeldOut(config.test_fraction, config.runtime.seed)
        train, test = train_and_test(config.data.paths, "finetune", columns_of(config.data), without_test, reading)
    else:
        train, test = train_and_test_clips(config.data.paths, config.frames, reading)
    groups = train.source.groups() if isinstance(train.source, Source) else None
    mask = held_out(train.y, config.optimization.held_out, config.runtime.seed, groups)
    found = copies(train.source, test.source) if config.frames is None else None
    return Splits(train.subset((~mask).nonzero()[:, 0]), train.subset(mask.nonzero()[:, 0]), test, found)


def fit_to_data(config: FinetuneConfig, splits: Splits) -> FinetuneConfig:
    """Resolve `lr` and reduce the batch to the data's size, even under mixup. Raises DataError for too few images."""
    batch = min(config.optimization.batch_size, len(splits.learn.y))
    if config.regularization.mixup or config.regularization.cutmix:
        batch -= batch % 2  # timm pairs the images of a batch
    if batch < 2:
        raise DataError(f"data: {len(splits.learn.y)} images to learn from, at least 2 are needed")
    if config.optimization.held_out and not len(splits.choose.y):
        log.warning("held_out: %s of each class is no image; the last epoch is kept", config.optimization.held_out)
        config = replace_flat(config, held_out=0.0)
    lr = LR[config.method] if config.optimization.lr is None else config.optimization.lr
    return replace_flat(config, batch_size=batch, lr=lr)
