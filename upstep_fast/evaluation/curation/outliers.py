"""Images unlike all others.

    d_i = log of the mean over the k nearest of 1 - cosine
    z_i = (d_i - median d) / (1.4826 median |d - median d|)

The logarithm, as distances have a long tail to the right. Copies of an image do not count as its neighbors. Where half
of the images have one distance, 1.2533 times the mean absolute deviation takes the place of the scale. Source:
Ramaswamy, Rastogi, Shim, SIGMOD 2000, "Efficient algorithms for mining outliers from large data sets" (there the k-th
distance); Iglewicz and Hoaglin 1993, "How to detect and handle outliers", whose limit of 3.5 is LISTED.
"""

from __future__ import annotations

import numpy as np

from upstep_fast.evaluation.curation.neighbors import Neighbors

K = 10
LISTED = 3.5
ROUNDING = 1e-6  # of a similarity in fp32; smaller distances are equal


def outlier_scores(neighbors: Neighbors, k: int = K) -> np.ndarray:
    """Return z [N] fp64; 0 for an image of which no neighbor counts."""
    of = neighbors.first(k)
    num = of.sum(1)
    with np.errstate(invalid="ignore"):
        distance = ((1 - neighbors.similarity.astype(np.float64)) * of).sum(1) / num
    z = np.zeros(len(distance))
    z[num > 0] = robust_z(np.log(np.maximum(distance[num > 0], ROUNDING)))
    return z


def robust_z(values: np.ndarray) -> np.ndarray:
    """Return the values' distance to their median in robust standard deviations, [N]; 0 where they do not vary."""
    if not len(values):
        return values
    centered = values - np.median(values)
    scale = 1.4826 * float(np.median(np.abs(centered))) or 1.2533 * float(np.mean(np.abs(centered)))
    return centered / scale if scale else np.zeros(len(values))
