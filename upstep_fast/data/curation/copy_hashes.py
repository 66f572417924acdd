"""Perceptual hashes that find copies: scaled, recompressed, recolored, mirrored or cropped by about 5 %.

    H(x) = hashes of x, of its mirror image, and of 3 x 3 cuts of 95 % of its sides
    bits(a, b) = the least distance of the hash of one to the hashes of the other

A cut differs from the nearest of these by at most a quarter of CUT, which the low frequencies hardly show. As the
least of several distances is smaller, cuts must agree better (NEAR_CUT) than whole pictures (NEAR). Both were chosen on
planted copies (bench/evaluation/curation.py).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.curation.perceptual_hash import perceptual_hash
from upstep_fast.data.views.color import GRAY
from upstep_fast.data.views.resize import resize

CUT = 0.05
NEAR, NEAR_CUT = 6, 4  # bits of 64
WHOLE = 2  # of the hashes: the image and its mirror image
_SIDE = 128  # pixels of the picture that is cut
_PLACES = [(down / 2, right / 2) for down in range(3) for right in range(3)]  # of cuts, in parts of what is left out
COUNT = WHOLE + len(_PLACES)


def copy_hashes(image: Tensor) -> np.ndarray:
    """Return H of an image, uint8 [C, H, W]: [COUNT] uint64, first its own and that of its mirror image."""
    gray = _gray(image)
    small = resize(gray, (_SIDE, _SIDE), "bilinear") if min(gray.shape[1:]) > _SIDE else gray
    height, width = small.shape[1:]
    dy, dx = max(1, round(CUT * height)), max(1, round(CUT * width))
    pictures = [gray, gray.flip(-1)]
    for down, right in _PLACES if min(height - dy, width - dx) >= 1 else ():
        top, left = round(down * dy), round(right * dx)
        pictures.append(small[:, top : top + height - dy, left : left + width - dx])
    hashes = [perceptual_hash(picture) for picture in pictures]
    return np.array(hashes + hashes[:1] * (COUNT - len(hashes)), np.uint64)


def are_copies(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which pairs are one picture, [P] bool. a, b: hashes of the images of the pairs, [P, COUNT] uint64."""
    whole = _bits(a[:, :1], b[:, :WHOLE]).min(1)
    cut = np.minimum(_bits(a[:, :1], b).min(1), _bits(b[:, :1], a).min(1))
    return (whole <= NEAR) | (cut <= NEAR_CUT)


def _gray(image: Tensor) -> Tensor:
    one = image[:1] if image.stride(0) == 0 else image
    if len(one) == 1:
        return one.contiguous()
    x = one.float()
    gray = (x * x.new_tensor(GRAY).view(3, 1, 1)).sum(0) if len(x) == 3 else x.mean(0)
    return gray.round().to(torch.uint8)[None]


def _bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _ONES[(a ^ b)[..., None].view(np.uint8)].sum(-1, dtype=np.int64)


_ONES = np.array([i.bit_count() for i in range(256)], np.uint8)
