"""Features of any number of images in a folder of shards: resumed after a kill, extended by new images.

memory    of one shard of features; the names of the images are there anyway
ranks     shard k belongs to rank k mod W
batches   never cross a shard, so a shard's features depend neither on a kill nor on the number of ranks
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.loading.skipped_images import SkippedImages, too_many
from upstep_fast.errors import DataError, Interrupted
from upstep_fast.evaluation.feature_files import folder as feature_folder
from upstep_fast.evaluation.feature_files.changes import compared, warn_of_changed
from upstep_fast.evaluation.feature_files.folder import CURE, NameIndex
from upstep_fast.evaluation.feature_files.job import FeatureJob
from upstep_fast.evaluation.feature_files.moved import moved, parse_moved
from upstep_fast.evaluation.feature_files.parquet import (
    FACTS,
    SIZES,
    SKIPPED,
    Plan,
    read_plans,
    read_shard_facts,
    require_same,
)
from upstep_fast.evaluation.feature_files.write import write_table
from upstep_fast.evaluation.features import Extractor, log_time, log_work, make_extractor
from upstep_fast.model import pooling
from upstep_fast.runtime import distributed
from upstep_fast.runtime.atomic_file import write_atomic, write_errors
from upstep_fast.runtime.progress import Task, track

log = logging.getLogger("upstep_fast")


class MissingShard(NamedTuple):
    """Shard that is not written yet."""

    plan: Plan
    number: int
    names: list[str]
    positions: np.ndarray  # of the images in the source, [n] int64; -1: not there


class FolderCounts:
    """Counts of rows and skipped images in a folder, from this command and earlier ones."""

    def __init__(self) -> None:
        self.there, self.new, self.skipped, self.shards = 0, 0, 0, 0
        self.first: tuple[str, str] | None = None  # name and reason of the first skipped image
        self.seconds = 0.0

    def skip(self, skipped: dict[str, str]) -> None:
        """Count images that could not be read."""
        self.skipped += len(skipped)
        self.first = self.first or next(iter(skipped.items()), None)

    def check(self, total: int, max_bad_fraction: float) -> None:
        """Raise DataError if too many of `total` images were skipped."""
        if self.first and too_many(self.skipped, total, max_bad_fraction):
            name, reason = self.first
            raise DataError(
                f"data: {self.skipped:,} of {total:,} images cannot be used, more than the {max_bad_fraction:.2%} "
                f"allowed; the first: {name}: {reason}; repair them, or raise --max-bad-fraction"
            )

    def __str__(self) -> str:
        """Return the counts in words."""
        rate = f", {self.new / self.seconds:,.0f} images/s" if self.new and self.seconds else ""
        shards = f" in {self.shards:,} shard{'s' * (self.shards != 1)}" if self.shards else ""
        skipped = f", {self.skipped:,} skipped" if self.skipped else ""
        return f"{self.there:,} there, {self.new:,} new{shards}{skipped}{rate}"


def run(job: FeatureJob, folder: Path) -> tuple[FeatureJob, FolderCounts]:
    """Write what is missing in the folder, and the images that are not in it yet. Raises UpstepError.

    Returns the job as it was matched to the folder, and the counts of all ranks.
    """
    plans = read_plans(folder)
    job = feature_folder.matched(job, plans)
    counts = _counted(plans, job)
    index = NameIndex.of(job.source)
    positions, changed = compared(job.source, plans, index, job.config.moved)
    warn_of_changed(changed)
    _require_images(plans, index, job)
    distributed.wait_for_ranks()  # all have read the plans before one is added
    if len(positions) and distributed.is_first():
        feature_folder.write_plan(folder, len(plans), job, positions)
    distributed.wait_for_ranks()
    plans = read_plans(folder)
    total = sum(plan.rows for plan in plans)
    counts.check(total, job.config.data.max_bad_fraction)
    if any(plan.missing() for plan in plans):
        _write_shards(job, plans, index, counts, total)
    return job, counts


def _counted(plans: Sequence[Plan], job: FeatureJob) -> FolderCounts:
    """Return what the folder holds. Raises DataError for a shard that is damaged or of another kind."""
    counts = FolderCounts()
    for plan in plans:
        missing = set(plan.missing())
        for k in (k for k in range(plan.num_shards) if k not in missing):
            rows, facts, skipped, _ = read_shard_facts(plan.shard(k))
            require_same(facts, job.facts, plan.shard(k))
            if rows + len(skipped) != len(plan.shard_rows(k)):
                raise DataError(
                    f"features: {plan.shard(k)} lacks images of {plan.path.name}; delete it and repeat embed"
                )
            counts.there += rows
            counts.skip(skipped)
    return counts


def _require_images(plans: Sequence[Plan], index: NameIndex, job: FeatureJob) -> None:
    """Raise DataError if images that are planned, and not embedded yet, are in data that was not given.

    Those that are gone from data that was given count as images that cannot be read.
    """
    lost: list[str] = []
    data: list[str] = []
    given = set(map(str, job.config.data.paths))
    for shard in _missing_shards(plans, index, job):
        if given.issuperset(map(str, shard.plan.metadata.get("data") or [""])):
            continue
        lost += [name for name, at in zip(shard.names, shard.positions, strict=True) if at < 0]
        data = shard.plan.metadata.get("data") or []
    if lost:
        raise DataError(
            f"data: {len(lost):,} images that {plans[0].folder} has yet to embed are not in --data, the first "
            f"{lost[0]} (it was begun with --data {' '.join(map(str, data))[:500]}); give their place with "
            "--data and, if they have moved, --moved OLD=NEW, or start anew with --overwrite"
        )


def _missing_shards(plans: Sequence[Plan], index: NameIndex, job: FeatureJob) -> Iterator[MissingShard]:
    """Yield the shards that are not written yet."""
    places = parse_moved(job.config.moved)
    for plan in plans:
        missing = set(plan.missing())
        for k, names in enumerate(plan.names() if missing else ()):
            if k in missing:
                yield MissingShard(plan, k, names, index.find(moved(name, places) for name in names))


def _write_shards(job: FeatureJob, plans: Sequence[Plan], index: NameIndex, counts: FolderCounts, total: int) -> None:
    """Write this rank's missing shards, and wait for those of the others."""
    rank, ranks = distributed.rank(), distributed.size()
    missing = [(plan, k) for plan in plans for k in plan.missing()]
    own = sum(len(plan.shard_rows(k)) for plan, k in missing if k % ranks == rank)
    num = sum(len(plan.shard_rows(k)) for plan, k in missing)
    log_time(num, {kind: job.models[kind] for kind in job.kinds}, job.compute)
    log_work("embed", num, job.models, job.kinds)
    how = job.config, job.compute
    extractor = make_extractor(job.source, job.models, *how, patches=bool(job.fitted), kinds=job.kinds)
    began, before, sizes = time.monotonic(), counts.skipped, job.source.sizes()
    with track("embed", own, device=job.compute.device.type) as task:
        try:
            for shard in _missing_shards(plans, index, job):
                if shard.number % ranks == rank:
                    _write_shard(shard, sizes, extractor, job, counts, total, task)
        except KeyboardInterrupt as error:
            written = f"{counts.shards:,} of {len(missing):,} shards are written"
            raise Interrupted(f"embed: stopped; {written}; repeat the command to go on") from error
    distributed.wait_for_ranks()
    every = distributed.gather([counts.new, counts.shards, counts.skipped - before])
    counts.new, counts.shards, skipped = (sum(column) for column in zip(*every, strict=True))
    counts.skipped, counts.seconds = before + skipped, time.monotonic() - began
    counts.check(total, job.config.data.max_bad_fraction)


def _write_shard(
    shard: MissingShard,
    sizes: np.ndarray,
    extractor: Extractor,
    job: FeatureJob,
    counts: FolderCounts,
    total: int,
    task: Task,
) -> None:
    """Embed the images of a shard and write it atomically; those that cannot be read are recorded in it."""
    unread, at = SkippedImages(), shard.positions
    read, rows = extractor.run(at[at >= 0].tolist(), unread, task, 1.0)
    is_read = set(read)
    skipped = {
        name: unread.get(job.source.name(i), "cannot be read") if i >= 0 else "not in --data any more"
        for name, i in zip(shard.names, at.tolist(), strict=True)
        if i not in is_read
    }
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    counts.skip(skipped)
    counts.check(total, job.config.data.max_bad_fraction)
    features = {name: x.numpy() for name, x in job.features(_joined(rows, job)).items()}
    kept = [name for name in shard.names if name not in skipped]
    sizes_then = np.where(at < 0, -1, sizes[at]).tolist()
    metadata = {FACTS: job.facts, SKIPPED: skipped, SIZES: {"bytes": sizes_then}}
    with write_errors("the features", CURE):
        write_atomic(shard.plan.shard(shard.number), lambda file: write_table(kept, features, metadata, file))
    counts.new += len(kept)
    counts.shards += 1


def _joined(rows: dict[str, list[Tensor]], job: FeatureJob) -> dict[str, Tensor]:
    """Return each model's features of a shard, [n, P, D]; n may be 0."""
    base = job.models["base"]
    num = pooling.num_parts(base.vit) if job.fitted else 1
    return {kind: torch.cat([torch.empty(0, num, base.width), *parts]) for kind, parts in rows.items()}
