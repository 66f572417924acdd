"""Orientation of pictures: EXIF's and TIFF's numbers 1 to 8, applied to pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor

EXIF_ORIENTATION = 0x0112
TRANSPOSED = (5, 6, 7, 8)
_FLIPS = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}  # axes, after the transposition


def orientation_of(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 without one."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def upright(x: Tensor, orientation: int) -> Tensor:
    """Undo EXIF orientation 1 to 8 on [C, H, W]; other values count as 1."""
    if orientation in TRANSPOSED:
        x = x.transpose(1, 2)
    flips = _FLIPS.get(orientation)
    return x.flip(flips) if flips else x


def upright_array(x: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientation as `upright`, on an array [..., H, W]."""
    if orientation in TRANSPOSED:
        x = x.swapaxes(-2, -1)
    return np.flip(x, _FLIPS.get(orientation, ()))
