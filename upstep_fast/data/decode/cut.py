"""Tiles of pictures without random access: the picture is decoded once, kept among the latest, and cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import replace

import torch
from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.decode.image import decode, read_stored
from upstep_fast.data.formats.photographs import check_size
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import read_at, version_of
from upstep_fast.data.reading.stored import MAX_PIXELS, File, Layout, Piece, Stored
from upstep_fast.data.reading.tiles import read_piece

KEPT_BYTES = 512 << 20  # of decoded pictures
_pictures = Recent(KEPT_BYTES)


def cut(file: File, piece: Piece, *, channels: int, reading: Reading, layout: Layout) -> Tensor:
    """Return a window of a picture as uint8 [channels, H, W]. Raises BadImage, OSError, MemoryError.

    Not to be called with a part of the memory budget in hand: decoding takes it.
    """
    whole = replace(reading, tile=None, stride=None, level=None, mpp=None)

    def make(data: bytes | memoryview) -> Stored:
        side = min(layout.size("Y"), layout.size("X")) >> piece.level
        pixels = decode(
            data,
            channels=channels,
            max_pixels=MAX_PIXELS << 2 * piece.level,  # check_size has the limit of what is decoded
            min_side=side if piece.level else None,
            reading=whole,
        )
        return Stored(pixels.numpy(), 0, 255)

    return torch.from_numpy(_cut(file, piece, layout, (channels, whole), make).values)


def cut_values(file: File, piece: Piece, *, layout: Layout) -> Stored:
    """Return the values of a window before their map. Beyond 8 bits coarser levels are sampled. Raises as `cut`."""
    channels = layout.size("C")

    def make(data: bytes | memoryview) -> Stored:
        stored = read_stored(data, channels=channels, photographs=False)
        if stored is not None:
            step = 2**piece.level
            return replace(stored, values=stored.values[:, ::step, ::step], valid=None)
        return Stored(
            cut(file, replace(piece, window=None), channels=channels, reading=AS_STORED, layout=layout).numpy(), 0, 255
        )

    return _cut(file, piece, layout, ("values", channels), make)


def _cut(
    file: File, piece: Piece, layout: Layout, key: Hashable, make: Callable[[bytes | memoryview], Stored]
) -> Stored:
    """Return a window of the picture that `make` gives of the encoded file, or that is among the latest."""
    check_size(layout, piece.level)
    version = version_of(file) if isinstance(file, str) else hashlib.blake2b(file, digest_size=16).digest()

    def whole() -> tuple[Stored, int]:
        data = read_at(file, 0, version[1]) if isinstance(version, tuple) else file
        stored = make(data)  # type: ignore[arg-type]  # bytes
        return stored, stored.values.nbytes

    picture: Stored = _pictures.get((version, piece.level, key), whole)

    def window(_: File, part: Piece) -> Stored:
        top, left, height, width = layout.window(part)
        return replace(picture, values=picture.values[:, top : top + height, left : left + width])

    return read_piece(window, file, piece, layout)
