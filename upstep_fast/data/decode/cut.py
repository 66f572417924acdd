"""Tiles of pictures without random access: the picture is decoded once, kept among the latest, and cut."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.image import MAX_PIXELS, decode
from upstep_fast.data.formats.photographs import check_size
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import read_at, version_of
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.data.reading.tiles import read_piece

KEPT_BYTES = 512 << 20  # of decoded pictures
_pictures = Recent(KEPT_BYTES)


def cut(file: File, piece: Piece, *, channels: int, reading: Reading, layout: Layout) -> Tensor:
    """Return a window of a picture as uint8 [channels, H, W]. Raises BadImage, OSError, MemoryError.

    Not to be called with a part of the memory budget in hand: decoding takes it.
    """
    check_size(layout, piece.level)
    whole = replace(reading, tile=None, stride=None, level=None, mpp=None)
    version = version_of(file) if isinstance(file, str) else hashlib.blake2b(file, digest_size=16).digest()

    def make() -> tuple[Tensor, int]:
        data = read_at(file, 0, version[1]) if isinstance(version, tuple) else file
        side = min(layout.size("Y"), layout.size("X")) >> piece.level
        pixels = decode(
            data,  # type: ignore[arg-type]  # bytes
            channels=channels,
            max_pixels=MAX_PIXELS << 2 * piece.level,  # check_size has the limit of what is decoded
            min_side=side if piece.level else None,
            reading=whole,
        )
        return pixels, pixels.untyped_storage().nbytes()

    pixels: Tensor = _pictures.get((version, piece.level, channels, whole), make)

    def window(_: File, part: Piece) -> Stored:
        top, left, height, width = layout.window(part)
        return Stored(pixels[:, top : top + height, left : left + width].numpy(), 0, 255)

    return torch.from_numpy(read_piece(window, file, piece, layout).values)
