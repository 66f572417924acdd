"""Windows of large TIFFs and slides by tifffile: only the tiles or strips that a window meets are read and decoded.

levels        SubIFDs or reduced pages of the same shape; of Aperio's slides all tiled pages
samples       as decode/tiff.py has them: white as zero is inverted, palettes and 1, 2, 4 bits are expanded, YCbCr in
              JPEG and JPEG 2000 becomes RGB, colors with associated alpha are put on white
not stored    segments of sparse files are nodata
orientation   applied: windows are those of the upright picture
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from upstep_fast.data.formats import tiff_pyramid
from upstep_fast.data.formats.tiff_pyramid import (
    APERIO_YCBCR,
    CMYK,
    PALETTE,
    RGB,
    WHITE_IS_ZERO,
    Level,
    Pyramid,
    open_pyramid,
)
from upstep_fast.data.reading.orientation import upright_array
from upstep_fast.data.reading.out_of_memory import error_of_library
from upstep_fast.data.reading.recent import Recent
from upstep_fast.data.reading.regular import read_at, version_of
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage

_ASSOCIATED, _UNASSOCIATED = 1, 2
_segments = Recent(256 << 20)  # decoded strips and tiles


def layout(file: File) -> Layout:
    """Return size, levels and resolution of a TIFF's first picture. Raises BadImage, OSError."""
    return pyramid_layout(open_pyramid(file))


def pyramid_layout(opened: Pyramid) -> Layout:
    """Return the layout of one picture with its levels."""
    base = opened.levels[0]
    sizes = tuple(_upright_size(level, opened.orientation) for level in opened.levels)
    bands = 3 if opened.photometric in (PALETTE, CMYK) or _has_alpha(opened) else base.samples
    return Layout("CYX", (bands, *sizes[0]), opened.what, sizes if len(sizes) > 1 else (), opened.mpp)


def read(file: File, piece: Piece) -> Stored:
    """Return a window of a level. Raises BadImage, OSError."""
    return read_window(file, open_pyramid(file), piece)


def read_window(file: File, opened: Pyramid, piece: Piece) -> Stored:
    """Return a window of a level of a picture whose segments are known. Raises BadImage, OSError."""
    window = pyramid_layout(opened).window(piece)
    level = opened.levels[piece.level]
    window = _as_stored(window, _upright_size(level, opened.orientation), opened.orientation)
    values, valid = _window(file, level, window)
    return _upright(_in_color(values, valid, opened), opened.orientation)


def has_data(file: File, piece: Piece) -> bool:
    """Return whether bytes are stored for any part of a window. Raises BadImage, OSError."""
    opened = open_pyramid(file)
    level = opened.levels[piece.level]
    if not level.is_sparse:
        return True
    size = _upright_size(level, opened.orientation)
    window = _as_stored(piece.window or (0, 0, *size), size, opened.orientation)
    return any(level.counts[index] for index, _, _ in _met(level, window))


def _window(file: File, level: Level, window: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return values [C, H, W] as stored, and which are [H, W]; None: all. window: of the picture as stored."""
    top, left, rows, columns = window
    met = list(_met(level, window))
    if len(met) == 1 and level.counts[met[0][0]]:  # without a copy
        index, row, column = met[0]
        part = _segment_rows(file, level, index, top - row, top + rows - row, _is_whole(level, window, row, column))
        return _cut(part, left - column, rows, columns).transpose(2, 0, 1), None
    values = np.zeros((rows, columns, level.samples), level.dtype)
    valid: np.ndarray | None = None
    for index, row, column in met:
        first, last = max(top, row), min(top + rows, row + level.segment[0])
        start, end = max(left, column), min(left + columns, column + level.segment[1])
        target = np.s_[first - top : last - top, start - left : end - left]
        if not level.counts[index]:
            valid = np.ones((rows, columns), bool) if valid is None else valid
            valid[target] = False
            continue
        is_whole = _is_whole(level, window, row, column)
        part = _segment_rows(file, level, index, first - row, last - row, is_whole)
        part = _cut(part, start - column, last - first, end - start)
        plane = index // level.per_plane
        values[target][..., plane : plane + 1 if level.planar else None] = part
    return values.transpose(2, 0, 1), valid


def _cut(part: np.ndarray, start: int, rows: int, columns: int) -> np.ndarray:
    part = part[:, start : start + columns]
    if part.shape[:2] != (rows, columns):
        raise BadImage("a strip or tile that holds fewer pixels than its header says")
    return part


def _is_whole(level: Level, window: tuple[int, int, int, int], row: int, column: int) -> bool:
    """Return whether a window takes all pixels of the segment at a place."""
    top, left, rows, columns = window
    ends = min(row + level.segment[0], level.height), min(column + level.segment[1], level.width)
    return top <= row and left <= column and top + rows >= ends[0] and left + columns >= ends[1]


def _met(level: Level, window: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Yield (index, top, left) of the segments that a window meets."""
    top, left, rows, columns = window
    height, width = level.segment
    for plane in range(level.samples if level.planar else 1):
        for row in range(top // height, (top + rows - 1) // height + 1):
            for column in range(left // width, (left + columns - 1) // width + 1):
                yield plane * level.per_plane + row * level.across + column, row * height, column * width


def _segment_rows(file: File, level: Level, index: int, first: int, last: int, is_whole: bool) -> np.ndarray:
    """Return rows of a decoded segment, [H, W, C] with the samples that it holds.

    is_whole: all of it is used at once, so that it is not kept for the next window.
    """
    offset, count = int(level.offsets[index]), int(level.counts[index])
    samples = 1 if level.planar else level.samples
    if level.is_plain:
        row_bytes = level.segment[1] * samples * level.dtype.itemsize
        if last * row_bytes > count:
            raise BadImage("truncated TIFF: a strip or tile is too short")
        data = read_at(file, offset + first * row_bytes, (last - first) * row_bytes)
        array = np.frombuffer(data, level.dtype.newbyteorder(level.order)).astype(level.dtype, copy=False)
        return array.reshape(last - first, level.segment[1], samples)

    def make() -> tuple[np.ndarray, int]:
        try:
            array = level.decode(read_at(file, offset, count), index, jpegtables=level.tables)[0][0]
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise error_of_library(error, "a strip or tile cannot be decoded") from error
        return array, array.nbytes

    if is_whole or not isinstance(file, str):
        return make()[0][first:last]
    segment: np.ndarray = _segments.get((version_of(file), offset, index), make)
    return segment[first:last]


def _in_color(values: np.ndarray, valid: np.ndarray | None, opened: Pyramid) -> Stored:
    """Return the picture's values [C, H, W] as colors or bands, with their range."""
    base = opened.levels[0]
    if opened.nodata is not None:
        stated = np.isnan(values) if math.isnan(opened.nodata) else values == opened.nodata
        valid = ~stated.all(0) if valid is None else valid & ~stated.all(0)
    if opened.colors is not None:
        return Stored((opened.colors[:, values[0]] >> 8).astype(np.uint8), 0, 255, valid)
    # Aperio's 33003 holds YCbCr in JPEG 2000, which tifffile returns as it is; JPEG comes as RGB
    mode = "CMYK" if opened.photometric == CMYK else "YCbCr" if opened.compression == APERIO_YCBCR else None
    if mode is not None:
        image = Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1)), mode).convert("RGB")
        return Stored(np.moveaxis(np.asarray(image), -1, 0), 0, 255, valid)
    if base.bits < 8:  # one bit comes as bool
        values = (values.astype(np.uint8) * (255 // ((1 << base.bits) - 1))).astype(
            np.uint8
        )  # exact for 1, 2 and 4 bits
    limits = _declared(values.dtype, max(8, base.bits))
    if _has_alpha(opened):
        top = int(limits[1] or 1)
        colors = values[:3].astype(np.int64) + top - values[3]
        values = np.clip(colors, 0, top).astype(values.dtype)  # colors are multiplied by alpha already
    colors = 3 if opened.photometric == RGB else 1 if opened.extra[:1] in ((_ASSOCIATED,), (_UNASSOCIATED,)) else 0
    return Stored(
        values,
        *limits,
        valid,
        inverted=opened.photometric == WHITE_IS_ZERO,
        colors=colors if len(values) > max(1, colors) else 0,
    )


def _has_alpha(opened: Pyramid) -> bool:
    """Return whether a fourth sample is how much the colors cover."""
    base = opened.levels[0]
    return opened.photometric == RGB and opened.extra[:1] == (_ASSOCIATED,) and base.dtype.kind == "u"


def _declared(dtype: np.dtype, bits: int) -> tuple[float | None, float | None]:
    if dtype.kind == "f":
        return None, None
    return (0, (1 << bits) - 1) if dtype.kind == "u" else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _upright_size(level: Level, orientation: int) -> tuple[int, int]:
    return (level.width, level.height) if orientation in (5, 6, 7, 8) else (level.height, level.width)


def _as_stored(window: tuple[int, int, int, int], size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Return a window of the upright picture of (height, width) `size` as one of the picture as it is stored."""
    (top, left, rows, columns), (height, width) = window, size
    top = height - top - rows if orientation in (3, 4, 7, 8) else top
    left = width - left - columns if orientation in (2, 3, 6, 7) else left
    return (left, top, columns, rows) if orientation in (5, 6, 7, 8) else (top, left, rows, columns)


def _upright(stored: Stored, orientation: int) -> Stored:
    """Undo orientation 1 to 8 of [C, H, W]."""
    if orientation not in range(2, 9):
        return stored
    valid = None if stored.valid is None else upright_array(stored.valid, orientation)
    return replace(stored, values=np.ascontiguousarray(upright_array(stored.values, orientation)), valid=valid)


def forget() -> None:
    """Forget headers and segments of files."""
    tiff_pyramid.forget()
    _segments.clear()
