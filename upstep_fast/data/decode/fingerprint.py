"""Fingerprint of the decoders on this machine."""

from __future__ import annotations

import functools
import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image

from upstep_fast.data.decode import jpeg
from upstep_fast.data.decode.image import decode
from upstep_fast.data.reading.orientation import EXIF_ORIENTATION
from upstep_fast.errors import BadImage


@functools.lru_cache
def decoder_fingerprint() -> str:
    """Return the JPEG decoder's name and SHA-256 over some images, encoded by this machine's libraries, then decoded.

    A change of value means that images may have other pixels than before: another libjpeg, libwebp or Pillow
    (RELIABILITY I7). A format that is not built in has its error hashed.
    """
    y, x = np.mgrid[:48, :72]
    smooth = Image.fromarray(np.stack([x * 3, y * 5, x * y // 16], -1).astype(np.uint8))
    gray, high = smooth.convert("L"), Image.fromarray((x * y * 19).astype(np.uint16))
    alpha = smooth.copy()
    alpha.putalpha(gray)
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    pictures: list[tuple[Image.Image, str, dict[str, Any], int | None]] = [
        *((smooth, "JPEG", {"quality": q, "subsampling": s}, None) for q, s in ((50, 2), (75, 2), (92, 1), (98, 0))),
        *((image, "JPEG", {"quality": 90}, None) for image in (gray, smooth.convert("CMYK"))),
        (smooth, "JPEG", {"quality": 85, "progressive": True}, None),
        (smooth, "JPEG", {"quality": 85, "exif": turned}, None),
        *((smooth.resize((640, 480)), "JPEG", {"quality": 85}, side) for side in (60, 240)),
        (smooth.resize((640, 480)), "PNG", {}, 60),
        *((image, "PNG", {}, None) for image in (smooth, alpha, smooth.quantize(16), high)),
        *((image, "WEBP", {"quality": 80}, None) for image in (smooth, alpha)),
        (smooth, "TIFF", {"compression": "tiff_lzw"}, None),
        (smooth.convert("YCbCr"), "TIFF", {"compression": "jpeg"}, None),
        (smooth.quantize(32), "GIF", {}, None),
        (smooth, "AVIF", {"quality": 80}, None),
    ]
    digest = hashlib.sha256()
    for image, kind, options, side in pictures:
        file = io.BytesIO()
        try:
            image.save(file, kind, **options)
            pixels = decode(file.getvalue(), min_side=side)
            digest.update(f"{kind} {tuple(pixels.shape)}".encode() + pixels.numpy().tobytes())
        except (KeyError, OSError, BadImage) as error:
            digest.update(f"{kind} {type(error).__name__}".encode())
    return f"{'torchvision' if jpeg.reader() else 'Pillow'} {digest.hexdigest()}"
