"""Copies of test images among the images for training."""

from __future__ import annotations

import numpy as np

from upstep_fast.evaluation.curation.duplicates import members


def leaks(group: np.ndarray, is_test: np.ndarray) -> list[tuple[int, int]]:
    """Return (training image, test image) of each training image that has a copy for testing, the first one of it.

    group: number of each image's group of copies, [N] int64; is_test: [N] bool.
    """
    found = []
    for images in members(group):
        if tests := [i for i in images if is_test[i]]:
            found += [(i, tests[0]) for i in images if not is_test[i]]
    return sorted(found)
