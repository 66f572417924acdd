"""Copies of training images among the test images, found by size and bytes in a sample of them."""

from __future__ import annotations

import contextlib

import numpy as np

from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.sources.source import Source

SAMPLE = 100  # test images that are looked at
MAX_READ = 10  # training images of one size that are read


def copies(train: Source, test: Source) -> tuple[int, int] | None:
    """Return (copies of training images found, test images looked at); None if there are none.

    The test images are the first by splitmix64(0, index). At most MAX_READ training images of a test image's size are
    read, so of many images of one size some copies are missed.
    """
    sizes, test_sizes = train.sizes(), test.sizes()
    order = np.argsort(sizes, kind="stable")
    chosen = np.argsort(bits_array(0, np.arange(len(test), dtype=np.uint64)), kind="stable")[:SAMPLE]
    found = 0
    for index in chosen.tolist():
        size = test_sizes[index]
        first, end = np.searchsorted(sizes, [size, size + 1], sorter=order)
        same = [index] if index < len(train) and sizes[index] == size else []  # of a test set that is the train set
        if size >= 0 and first < end:
            found += _is_copy(test, index, train, same + order[first:end][:MAX_READ].tolist())
    return (found, len(chosen)) if found else None


def _is_copy(test: Source, index: int, train: Source, candidates: list[int]) -> bool:
    with contextlib.suppress(OSError):  # an image that cannot be read is told later
        digest = test.digest(index)
        return any(train.digest(i) == digest for i in candidates)
    return False
