"""Changes since a folder of features was written: images that it lacks, and images that were replaced.

An image is known by its name. One that was replaced under its name is noticed by its size in bytes, which shards hold.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from upstep_fast.data.sources.source import Source
from upstep_fast.evaluation.feature_files.folder import NameIndex
from upstep_fast.evaluation.feature_files.moved import moved, parse_moved
from upstep_fast.evaluation.feature_files.parquet import Plan, read_shard_facts

log = logging.getLogger("upstep_fast")


class Changed(NamedTuple):
    """An image whose size is another than when it was embedded."""

    name: str
    shard: Path


def compared(
    source: Source, plans: Sequence[Plan], index: NameIndex, places_moved: Sequence[str]
) -> tuple[np.ndarray, list[Changed]]:
    """Return the positions of images that no plan names, in the order of the source, and images that have changed.

    places_moved: of --moved. Sizes of -1 are not known. Raises DataError for a damaged shard.
    """
    is_new, places, changed = np.ones(len(source), bool), parse_moved(places_moved), list[Changed]()
    sizes = source.sizes() if plans else np.empty(0, np.int64)
    for plan in plans:
        missing = set(plan.missing())
        for k, names in enumerate(plan.names()):
            at = index.find(moved(name, places) for name in names)
            is_new[at[at >= 0]] = False
            if k not in missing:
                then, now = _sizes_then(plan.shard(k), len(names)), np.where(at < 0, -1, sizes[at])
                others = at[(then >= 0) & (now >= 0) & (then != now)]
                changed += [Changed(source.name(i), plan.shard(k)) for i in others.tolist()]
    return np.flatnonzero(is_new), changed


def _sizes_then(path: Path, count: int) -> np.ndarray:
    """Return the sizes of a shard's images when it was written, [count] int64; -1 where one is not known."""
    found = read_shard_facts(path)[-1].get("bytes", [])
    try:
        sizes = np.array(found, np.int64)
    except (ValueError, TypeError, OverflowError):
        sizes = np.empty(0, np.int64)
    return sizes if sizes.shape == (count,) else np.full(count, -1)


def warn_of_changed(changed: Sequence[Changed]) -> None:
    """Log how many images have changed, and what embeds them again."""
    if changed:
        shards = len({one.shard for one in changed})
        log.warning(
            "features: images replaced since they were embedded (by their size): %s, the first %s; their features are "
            "the old ones: delete %s%s and embed again, or all with --overwrite",
            f"{len(changed):,}",
            changed[0].name,
            changed[0].shard,
            f" and {shards - 1:,} more" if shards > 1 else "",
        )
