"""Images to curate: their features, classes and parts, digests of their bytes, and hashes of their pictures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from upstep_fast.config.base import reading_of
from upstep_fast.config.curate import CurateConfig
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.data.curation.copy_hashes import copy_hashes
from upstep_fast.data.loading.skipped_images import SkippedImages, map_readable, read_image
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import DataError, NoTestPartError
from upstep_fast.evaluation.feature_files.table import FEATURES, FeatureTable
from upstep_fast.evaluation.run_features import data_of_run, read_or_embed
from upstep_fast.runtime import machine
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

AHEAD = 64  # images in flight


@dataclass(frozen=True, eq=False)
class Images:
    """N images: first those of --data, then those of --against."""

    source: Source
    names: tuple[str, ...]
    x: np.ndarray  # [N, D] fp32
    num: int  # images of --data
    labels: tuple[str, ...] | None  # of those of --data
    is_test: np.ndarray  # [N] bool
    channels: int
    files: np.ndarray | None  # number of each image's file, [N]; None: each image is one
    num_missing: int  # images without features
    hashes: dict[int, np.ndarray] = field(default_factory=dict)  # of `copy_hashes`, as far as they were needed
    pixels: dict[int, int] = field(default_factory=dict)

    def digests(self) -> list[Any]:
        """Return what equal images share, [N]; None for one whose size no other has, or that cannot be read."""
        sizes = self.source.sizes()
        _, at, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        found: list[Any] = [None] * len(self.names)
        same = np.flatnonzero((counts[at] > 1) | (sizes < 0)).tolist()
        with track("curate: digests", len(same)) as task:
            for i in same:
                with contextlib.suppress(OSError):
                    found[i] = self.source.digest(i)
                task.advance()
        return found

    def read_hashes(self, indices: Sequence[int]) -> None:
        """Add the hashes and sizes in pixels of these images, except of those that cannot be read."""
        todo = [i for i in indices if i not in self.hashes]

        def read(index: int) -> tuple[np.ndarray, int]:
            image = read_image(self.source, index, channels=self.channels)
            return copy_hashes(image), image.shape[1] * image.shape[2]

        options: dict[str, Any] = {"num_workers": machine.num_workers(None), "ahead": AHEAD, "max_bad_fraction": 1.0}
        with track("curate: hashes", len(todo)) as task:
            for index, found in map_readable(read, self.source, todo, SkippedImages(), **options):
                self.hashes[index], self.pixels[index] = found
                task.advance()


def read_images(config: CurateConfig) -> Images:
    """Open the images and read or compute their features. Raises UpstepError."""
    paths = config.data or data_of_run(config.run)
    how = from_options(EmbedConfig, {"model": config.run, "data": paths, "out": "features.npy"}, "curate")
    data = _open(paths, how)
    log.info("data: %s", data.summary)
    table = read_or_embed(replace(config, data=tuple(paths)))[FEATURES]
    rows, at = _match(data, table)
    kept = subset(data, rows)
    names, x = [data.name(i) for i in rows], table.x[at]
    is_test = np.isin(names, _test_names(paths, how)) if not config.against else np.zeros(len(names), bool)
    labels, missing, num = kept.labels, len(data) - len(rows), len(names)
    if config.against:
        against, others = _against(config, how, x.shape[1])
        kept = Source((*kept.parts, *against.parts), (), "", kept.reading)
        names += [against.name(i) for i in range(len(against))]
        x, is_test = np.concatenate([x, others]), np.append(is_test, np.ones(len(against), bool))
    if num < 2:
        raise DataError(f"data: {', '.join(paths)} has one image with features; curate compares at least 2")
    channels = how.model.in_chans or 3
    known = None if labels is None else tuple(labels)
    return Images(kept, tuple(names), x, num, known, is_test, channels, kept.groups(), missing)


def _open(paths: Sequence[str], how: EmbedConfig, split: str | None = None) -> Source:
    return open_source(paths, split, reading=reading_of(how.data))


def _test_names(paths: Sequence[str], how: EmbedConfig) -> list[str]:
    try:
        part = _open(paths, how, "test")
    except NoTestPartError:
        return []
    return [part.name(i) for i in range(len(part))]


def _match(source: Source, table: FeatureTable) -> tuple[list[int], list[int]]:
    """Return the images that have features, and the rows of these."""
    row = {name: i for i, name in enumerate(table.names)}
    found = [(i, row[name]) for i in range(len(source)) if (name := source.name(i)) in row]
    return [i for i, _ in found], [i for _, i in found]


def _against(config: CurateConfig, how: EmbedConfig, width: int) -> tuple[Source, np.ndarray]:
    """Return the images of --against and their features, those of --features if it has them.

    Raises DataError if the features differ in width from those of --data.
    """
    source = _open(config.against, how)
    log.info("against: %s", source.summary)
    config = replace(config, data=config.against)
    try:
        table = read_or_embed(config)[FEATURES]
    except DataError:
        if config.features is None:
            raise
        log.info("against: %s has no features of these images; they are embedded", config.features)
        table = read_or_embed(replace(config, features=None))[FEATURES]
    if table.x.shape[1] != width:
        raise DataError(
            f"features: those of --data have {width} values, those of --against {table.x.shape[1]}; leave out "
            "--features, or embed both into one folder"
        )
    rows, at = _match(source, table)
    return subset(source, rows), table.x[at]
