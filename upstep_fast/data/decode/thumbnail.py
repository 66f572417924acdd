"""Small pictures of images, for pages."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from torch import Tensor


def encode_thumbnail(
    image: Tensor, side: int, quality: int, resampling: Image.Resampling = Image.Resampling.BICUBIC
) -> bytes:
    """Return a WebP of at most `side` pixels of an image, uint8 [C, H, W]; of its first channel unless C is 3."""
    pixels = image if image.shape[0] == 3 else image[:1].expand(3, -1, -1)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
    picture.thumbnail((side, side), resampling)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=quality)
    return file.getvalue()
