"""Decoding of one picture of a file that has a reader of its own (data/formats), to uint8 [C, H, W]."""

from __future__ import annotations

from torch import Tensor

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.cut import cut, cut_values
from upstep_fast.data.decode.image import pixels_of_values, shrunk
from upstep_fast.data.formats import kinds
from upstep_fast.data.reading.budget import BYTES_PER_VALUE, decoding
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.data.reading.tiles import level_sizes, read_piece
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
    """Return one picture or tile of a file as uint8 [channels, H, W].

    layout: of the file, for the memory budget and for tiles that are resized. Raises BadImage, or OSError or
    MemoryError, which say nothing about the image.
    """
    try:
        if kind == kinds.PHOTOGRAPH and layout is not None:
            return shrunk(cut(file, piece, channels=channels, reading=reading, layout=layout), min_side)
        with decoding.hold(BYTES_PER_VALUE * num_values(layout, piece)):
            stored = stored_piece(kind, file, piece, layout)
            return shrunk(pixels_of_values(stored, reading, channels), min_side)
    except (BadImage, OSError):
        raise
    except Exception as error:  # libraries raise many kinds for damaged files
        raise error_of_library(error, "cannot be decoded") from error


def stored_piece(kind: kinds.Kind, file: File, piece: Piece, layout: Layout | None) -> Stored:
    """Return one picture or tile, resized where its scale is not 1. Raises as its reader."""
    if kind == kinds.PHOTOGRAPH and layout is not None:
        return cut_values(file, piece, layout=layout)
    if layout is None or piece.scale == 1:
        return kinds.read(kind, file, piece)
    return read_piece(lambda one, part: kinds.read(kind, one, part), file, piece, layout)


def num_values(layout: Layout | None, piece: Piece) -> int:
    """Return how many values a picture has; 0 if that is not known."""
    if layout is None:
        return 0
    height, width = piece.window[2:] if piece.window else level_sizes(layout)[piece.level]
    bands = layout.size("C") * (1 if piece.stacked is None else piece.stacked[1])
    return int(height * width * bands * max(1.0, piece.scale) ** 2)
