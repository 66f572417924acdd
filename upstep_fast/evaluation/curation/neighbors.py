"""Nearest neighbors of all images among themselves, exactly, in blocks of rows.

Time: N^2 D products; 100,000 images of 192 features take a few minutes on a core. Memory: a block of at most
BLOCK_BYTES and the lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from upstep_fast.evaluation.search.exact import unit_rows
from upstep_fast.runtime.progress import Task

BLOCK_BYTES = 64 << 20
MANY = 32  # neighbors of an image that the rules look at


@dataclass(frozen=True, eq=False)
class Neighbors:
    """The k nearest images of each, nearest first, without itself."""

    index: np.ndarray  # [N, k] int64
    similarity: np.ndarray  # [N, k] fp32, cosine
    counts: np.ndarray  # [N, k] bool: False for one of the same group, see `without`

    def without(self, group: np.ndarray) -> Neighbors:
        """Return the neighbors of which those of the image's own group do not count. group: [N] int64."""
        return Neighbors(self.index, self.similarity, self.counts & (group[self.index] != group[:, None]))

    def first(self, k: int) -> np.ndarray:
        """Return which are the first k that count, [N, k'] bool."""
        return self.counts & (self.counts.cumsum(1) <= k)


def nearest(x: np.ndarray, k: int = MANY, task: Task | None = None) -> Neighbors:
    """Return the k nearest of each row by cosine, at most N - 1. x: [N, D], no row 0."""
    unit = torch.from_numpy(unit_rows(x))
    count, k = len(unit), min(k, len(unit) - 1)
    index, similarity = np.empty((count, k), np.int64), np.empty((count, k), np.float32)
    rows = max(1, BLOCK_BYTES // (4 * count))
    for start in range(0, count, rows):
        block = unit[start : start + rows] @ unit.T
        block[torch.arange(len(block)), torch.arange(start, start + len(block))] = -torch.inf
        values, found = block.topk(k, dim=1)
        similarity[start : start + rows], index[start : start + rows] = values.numpy(), found.numpy()
        if task is not None:
            task.advance(len(block))
    return Neighbors(index, similarity, np.ones((count, k), bool))
