"""Frames of animated GIF, WebP and PNG by Pillow, which puts each one together from those before it.

Chosen by `--slice`; by default the first frame is read, as a photograph. Frames are RGB of 8 bits, transparency on
white. A frame is decoded with all before it, so a file's pixels in all frames are bounded.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage, first_line

FORMATS = ("GIF", "WEBP", "PNG")
SUFFIXES = (b".gif", b".webp", b".png", b".apng")
MAX_ALL = 1 << 30  # pixels of all frames


def is_animation(file: File) -> bool:
    """Return whether a file has several frames; of a broken one False. Raises OSError."""
    try:
        with _opened(file) as image:
            return getattr(image, "n_frames", 1) > 1
    except BadImage:  # whoever decodes it says what is wrong
        return False


def layout(file: File) -> Layout:
    """Return the axes of an animation. Raises BadImage, or OSError for an error of the disk."""
    with _opened(file) as image:
        width, height = image.size
        frames = getattr(image, "n_frames", 1)
        if frames * width * height > MAX_ALL:
            raise BadImage(
                f"{frames} frames of {width} x {height} pixels, in all above the limit of {MAX_ALL}; write its frames "
                "as PNG"
            )
        return Layout("FCYX", (frames, 3, height, width), f"animated {image.format}, 8 bits")


def read(file: File, piece: Piece) -> Stored:
    """Return a frame, RGB. Raises as `layout`."""
    layout(file).window(piece)  # checks the frame and the number of pixels
    with _opened(file) as image:
        image.seek(piece.index("F"))
        frame: Image.Image = image
        if image.has_transparency_data:
            frame = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return Stored(np.ascontiguousarray(np.moveaxis(np.asarray(frame.convert("RGB")), -1, 0)), 0, 255)


@contextlib.contextmanager
def _opened(file: File) -> Iterator[Image.Image]:
    try:
        with Image.open(file if isinstance(file, str) else io.BytesIO(file), formats=FORMATS) as image:
            yield image
    except BadImage:
        raise
    except Exception as error:  # EOFError, SyntaxError, struct.error and others, for broken files
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        if is_out_of_memory(error):
            raise MemoryError("out of memory") from error
        raise BadImage(f"its frames cannot be read: {first_line(error)[:160]}") from error
