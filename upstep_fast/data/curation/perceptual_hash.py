"""Perceptual hashes: 64 bits that hardly change when an image is scaled, recompressed or slightly recolored.

    X = D g D^T,   bit[i, j] = X[i, j] > median(X),   i, j in 1..8

g: the gray image at 32 x 32 pixels, D: the orthonormal DCT-II. The lowest frequencies but the mean; half of the bits
are 1 by construction, so hashes of different images are about 32 bits apart. Source: Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions", section 3.2.1 (there with a 7 x 7 mean filter before).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.views.color import GRAY
from upstep_fast.data.views.resize import resize

SIDE, LOW = 32, 8
NEAR = 2  # bits; as half of the bits are 1, the distance of two hashes is always even
WINDOW = 64  # neighbors compared, in each of the four orders


def perceptual_hash(image: Tensor) -> int:
    """Return the 64-bit hash of an image, uint8 [C, H, W]."""
    x = resize(image[:1] if image.stride(0) == 0 else image, (SIDE, SIDE), "bilinear").double()
    gray = (x * x.new_tensor(GRAY).view(3, 1, 1)).sum(0) if len(x) == 3 else x.mean(0)
    low = _DCT @ gray @ _DCT.T
    bits = (low > low.median()).flatten().numpy()
    return int(np.packbits(bits).view(">u8")[0])


def near(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for each hash an earlier one that differs in at most NEAR bits: its index [N] or -1, and the bits [N].

    hashes: [N] uint64. Two hashes that differ in 2 bits agree in at least two of their four 16-bit bands. For each band
    they are sorted with that band in front, and each is compared with the WINDOW behind it that share the band: time
    N log N + 4 N WINDOW, whatever the hashes are. Pairs are missed only where more than WINDOW images share a band.
    Source: Manku, Jain, Das Sarma, WWW 2007, "Detecting near-duplicates for web crawling", section 3.
    """
    first = np.full(len(hashes), -1, np.int64)
    bits = np.zeros(len(hashes), np.int64)
    for band in range(4):
        shift = np.uint64(16 * band)
        turned = (hashes << shift) | (hashes >> np.uint64(64 - 16 * band)) if band else hashes
        order = np.argsort(turned, kind="stable")
        sorted_, front = turned[order], (turned[order] >> np.uint64(48)).astype(np.uint16)
        for gap in range(1, min(WINDOW, len(hashes) - 1) + 1):
            at = np.flatnonzero(front[gap:] == front[:-gap])
            if not len(at):
                break
            distance = _popcount(sorted_[at + gap] ^ sorted_[at])
            hit = distance <= NEAR
            pair = np.stack([order[at[hit]], order[at[hit] + gap]])
            low, high = pair.min(0), pair.max(0)
            # the earliest of all that are near, so that the order of the search does not matter
            better = (first[high] < 0) | (low < first[high])
            _keep_least(first, bits, high[better], low[better], distance[hit][better])
    return first, bits


def _keep_least(first: np.ndarray, bits: np.ndarray, high: np.ndarray, low: np.ndarray, distance: np.ndarray) -> None:
    order = np.lexsort((-low, high))  # of several for one hash the last, the least, is what stays
    first[high[order]], bits[high[order]] = low[order], distance[order]


def _popcount(x: np.ndarray) -> np.ndarray:
    return _BITS[x.view(np.uint16)].reshape(-1, 4).sum(1, dtype=np.int64)


def _dct() -> Tensor:
    n, k = torch.arange(SIDE, dtype=torch.float64), torch.arange(1, LOW + 1, dtype=torch.float64)
    return torch.cos(math.pi * (2 * n + 1) * k[:, None] / (2 * SIDE)) * math.sqrt(2 / SIDE)


_DCT = _dct()  # [8, 32]
_BITS = np.array([i.bit_count() for i in range(1 << 16)], np.uint8)
