"""Headers of pictures without random access (JPEG, PNG, WebP ...), of which tiles are cut after decoding.

The pixels come from data/decode (decode/cut.py). Levels are 1/1, 1/2, 1/4 and 1/8 of the size: JPEGs are decoded at
them by libjpeg, others are reduced by the mean over blocks.
"""

from __future__ import annotations

import io

from PIL import Image

from upstep_fast.data.reading.orientation import TRANSPOSED, orientation_of
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.stored import MAX_PIXELS, File, Layout
from upstep_fast.errors import BadImage

LEVELS = 4
# only decoders of pixels: no PostScript, no fonts, nothing that starts a program
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "AVIF")
_GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "F")


def layout(file: File) -> Layout:
    """Return the size of an upright picture and of its levels. Raises BadImage, OSError."""
    try:
        with Image.open(file if isinstance(file, str) else io.BytesIO(file), formats=FORMATS) as image:
            width, height = image.size
            kind, bands = image.format or "picture", 1 if image.mode in _GRAY else 3
            if orientation_of(image) in TRANSPOSED:
                height, width = width, height
    except OSError as error:
        if error.errno is not None:  # of the disk or network; UnidentifiedImageError has none
            raise
        raise BadImage("not an image in a known format") from error
    except Exception as error:  # SyntaxError, struct.error and others, for broken headers
        raise error_of_library(error, "its header cannot be read") from error
    sizes = tuple((-(-height // 2**k), -(-width // 2**k)) for k in range(LEVELS) if min(height, width) >= 2**k)
    return Layout("YXC", (height, width, bands), kind, sizes if len(sizes) > 1 else ())


def check_size(layout: Layout, level: int) -> None:
    """Raise BadImage if a level has more pixels than are decoded at once. PNG and others are decoded at full size."""
    is_scaled = layout.what == "JPEG"
    sizes = layout.levels or ((layout.size("Y"), layout.size("X")),)
    height, width = sizes[level if is_scaled else 0]
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels of a {layout.what}, which is decoded as a whole, above the limit of "
            f"{MAX_PIXELS}; write it as a tiled TIFF{', or give a higher --level' if is_scaled else ''}"
        )
