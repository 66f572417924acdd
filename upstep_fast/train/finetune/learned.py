"""Images that a classifier has learned from, known again by size and hash, so that no accuracy is measured on them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.sources.source import Source

AHEAD = 64  # images that are read ahead, per thread


def fingerprints(source: Source, indices: Sequence[int], workers: int) -> Tensor:
    """Return (bytes, BLAKE2b of the encoded image as 64 bits) of the images at `indices`, [n, 2] int64.

    An image that cannot be read gives (-1, 0). workers: threads.
    """

    def read(index: int) -> tuple[int, int]:
        with contextlib.suppress(OSError):
            size, digest = source.digest(index)
            return size, int.from_bytes(digest, "little", signed=True)
        return -1, 0

    found = list(ordered_map(read, indices, workers, AHEAD * max(1, workers)))
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)


def are_among(source: Source, indices: Sequence[int], known: Tensor, workers: int) -> Tensor:
    """Return which of the images at `indices` are among the `known`, [n] bool. known: from `fingerprints`.

    Only images of a size that occurs among the known ones are read.
    """
    sizes, places = source.sizes()[np.asarray(indices, dtype=np.int64)], np.arange(len(indices))
    maybe = places[np.isin(sizes, known[:, 0].numpy()) | (sizes < 0)]
    pairs = {(size, digest) for size, digest in known.tolist() if size >= 0}
    found = torch.zeros(len(indices), dtype=torch.bool)
    read = fingerprints(source, [indices[i] for i in maybe], workers).tolist()
    found[torch.from_numpy(maybe)] = torch.tensor([tuple(pair) in pairs for pair in read], dtype=torch.bool)
    return found
