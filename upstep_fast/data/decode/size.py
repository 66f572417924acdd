"""Size of an image once it is decoded, from its header."""

from __future__ import annotations

import io

from PIL import Image

from upstep_fast.data.decode.arrays import NPY, npy_header
from upstep_fast.data.formats.photographs import FORMATS
from upstep_fast.data.reading.tiff_header import TIFF, read_pages


def image_size(data: bytes | memoryview) -> tuple[int, int] | None:
    """Return (height, width) as stored, at full size; None if the header does not tell."""
    start = bytes(data[:8])
    try:
        if start.startswith(NPY):
            height, width = sorted(npy_header(io.BytesIO(data))[0])[-2:]  # bands are fewer than rows and columns
            return height, width
        if start[:4] in TIFF:
            page = read_pages(data, max_pages=1)[0][0]
            return page.height, page.width
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.height, image.width
    except Exception:  # decoding says what is wrong
        return None
