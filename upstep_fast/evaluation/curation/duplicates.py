"""Exact and near copies among images.

    exact   equal size and digest of the encoded bytes
    near    among the nearest neighbors by features, similarity >= the threshold, and the perceptual hash agrees
    group   a connected component of these pairs

threshold: the QUANTILE of the similarities to the nearest neighbor: 9 of 10 images have one as near as that. Features
propose; it is the hash that tells a copy from an image of the same thing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from upstep_fast.evaluation.curation.neighbors import Neighbors

QUANTILE = 0.1
CANDIDATES = 10  # neighbors of an image that may be its copies


def exact_groups(digests: Sequence[Hashable | None]) -> np.ndarray:
    """Return the index of the first image with the same digest, [N] int64; None: equal to no other."""
    first: dict[Hashable, int] = {}
    return np.array([i if d is None else first.setdefault(d, i) for i, d in enumerate(digests)], np.int64)


def threshold(neighbors: Neighbors) -> float:
    """Return the least similarity of near copies."""
    counted = np.where(neighbors.counts, neighbors.similarity, -np.inf).max(1, initial=-np.inf)
    counted = counted[np.isfinite(counted)]
    return float(np.quantile(counted, QUANTILE)) if len(counted) else 1.0


def candidates(neighbors: Neighbors, least: float) -> np.ndarray:
    """Return pairs of images that may be near copies, [P, 2] int64, the lower index first, each pair once."""
    near = neighbors.first(CANDIDATES) & (neighbors.similarity >= least)
    a, column = np.nonzero(near)
    pairs = np.sort(np.stack([a, neighbors.index[a, column]], 1), axis=1)
    return np.unique(pairs, axis=0) if len(pairs) else pairs


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Return the least index of each image's connected component, [count] int64. pairs: [P, 2]."""
    root = np.arange(count)

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = int(root[i])
        return i

    for a, b in pairs.tolist():
        low, high = sorted((find(a), find(b)))
        root[high] = low
    return np.array([find(i) for i in range(count)], np.int64)


def members(group: np.ndarray) -> list[list[int]]:
    """Return the images of each group of several, in order."""
    of: dict[int, list[int]] = defaultdict(list)
    for i, first in enumerate(group.tolist()):
        of[first].append(i)
    return [images for images in of.values() if len(images) > 1]


def kept(images: Sequence[int], size: Callable[[int], int]) -> int:
    """Return which image of a group is kept: the largest, and of equal ones the first."""
    return max(images, key=lambda i: (size(i), -i))
