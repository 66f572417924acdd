"""Decoding of one picture of a file that has a reader of its own (data/formats), to uint8 [C, H, W]."""

from __future__ import annotations

from torch import Tensor

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.image import shrunk
from upstep_fast.data.formats import kinds
from upstep_fast.data.reading.budget import BYTES_PER_VALUE, decoding
from upstep_fast.data.reading.intensity import to_pixels
from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.stored import File, Layout, Piece
from upstep_fast.errors import BadImage


def decode_piece(
    kind: kinds.Kind,
    file: File,
    piece: Piece,
    *,
    channels: int,
    min_side: int | None,
    reading: Reading,
    layout: Layout | None = None,
) -> Tensor:
    """Return one picture of a file as uint8 [channels, H, W].

    layout: of the file, for the memory budget. Raises BadImage, or OSError or MemoryError, which say nothing about the
    image.
    """
    try:
        with decoding.hold(BYTES_PER_VALUE * _num_values(layout, piece)):
            return shrunk(to_pixels(kinds.read(kind, file, piece), reading, channels), min_side)
    except (BadImage, OSError):
        raise
    except Exception as error:  # libraries raise many kinds for damaged files
        if is_out_of_memory(error):
            raise MemoryError("out of memory") from error
        reason = f"cannot be decoded: {type(error).__name__}: {str(error)[:120]}".replace("\n", " ")
        raise BadImage(reason) from error


def _num_values(layout: Layout | None, piece: Piece) -> int:
    """Return how many values a picture has; 0 if that is not known."""
    if layout is None:
        return 0
    height, width = piece.window[2:] if piece.window else (layout.size("Y"), layout.size("X"))
    bands = layout.size("C") * (1 if piece.stacked is None else piece.stacked[1])
    return height * width * bands
