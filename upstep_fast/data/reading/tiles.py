"""Tiles of large pictures: the grid of windows, the level of a pyramid that they are read from, and blank ones.

Tiles lie at multiples of the stride; the last of a row or column is moved back to be flush with the edge, so that every
pixel is in a tile and all tiles are of one size. A side shorter than a tile gives tiles of that side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image

from upstep_fast.config.reading import Reading
from upstep_fast.data.reading.stored import File, Layout, Piece, Stored
from upstep_fast.errors import BadImage

BLANK = 1 / 255  # of the range: a tile whose standard deviation is below this in every band is blank
BLANK_SIDE = 8  # pixels of a tile that are enough to tell
ENLARGED = 0.9  # smallest scale: a level may be coarser than --mpp by a tenth
_MARGIN = 4  # pixels around a window that the filter of a resize by up to 2 reaches, times the scale
_BLOCK = 1 << 22  # pixels read at once to find blank tiles

ReadPiece = Callable[[File, Piece], Stored]


@dataclass(frozen=True)
class Grid(Sequence[Piece]):
    """Tiles of one picture, row by row. Sizes are in pixels of the level divided by `scale`."""

    piece: Piece  # the picture: its place on the other axes, and the level
    height: int
    width: int
    tile: int
    stride: int
    kept: np.ndarray | None = None  # [N] int32, places of the tiles that are not blank; None: all

    @cached_property
    def tops(self) -> np.ndarray:
        """Top of each row of tiles, [rows] int64."""
        return starts(self.height, self.tile, self.stride)

    @cached_property
    def lefts(self) -> np.ndarray:
        """Left of each column of tiles, [columns] int64."""
        return starts(self.width, self.tile, self.stride)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts) if self.kept is None else len(self.kept)

    def __getitem__(self, index):  # one tile; slices are not needed
        place = int(range(len(self))[index] if self.kept is None else self.kept[index])
        row, column = divmod(place, len(self.lefts))
        size = min(self.tile, self.height), min(self.tile, self.width)
        return replace(self.piece, window=(int(self.tops[row]), int(self.lefts[column]), *size))

    def digest(self) -> bytes:
        """Return SHA-256 over the tiles."""
        text = repr((self.piece, self.height, self.width, self.tile, self.stride, self.kept is None))
        return hashlib.sha256(text.encode() + (b"" if self.kept is None else self.kept.tobytes())).digest()

    def __iter__(self) -> Iterator[Piece]:
        return (self[index] for index in range(len(self)))


def starts(size: int, tile: int, stride: int) -> np.ndarray:
    """Return where tiles begin along a side of `size` pixels: 0, stride, 2 stride ... and size - tile. [N] int64."""
    last = max(0, size - tile)
    return np.append(np.arange(0, last, stride), last)


def grid(layout: Layout, reading: Reading, piece: Piece = Piece()) -> Grid:  # noqa: B008  (frozen)
    """Return the tiles of one picture of a file, blank ones included. Raises BadImage, naming --level or --mpp."""
    if reading.tile is None:
        raise ValueError("reading.tile: got None, must be a number of pixels")
    level, scale = level_of(layout, reading)
    height, width = (max(1, int(side / scale + 1e-6)) for side in level_sizes(layout)[level])  # whole pixels only
    return Grid(replace(piece, level=level, scale=scale), height, width, reading.tile, reading.stride or reading.tile)


def at_level(layout: Layout, reading: Reading, piece: Piece) -> Piece:
    """Return a whole picture at the level that --level or --mpp asks for. Raises BadImage."""
    level, scale = level_of(layout, reading)
    if scale == 1:
        return replace(piece, level=level)
    height, width = (max(1, int(side / scale + 1e-6)) for side in level_sizes(layout)[level])
    return replace(piece, level=level, scale=scale, window=(0, 0, height, width))


def level_sizes(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Return (height, width) of each level, full size first."""
    return layout.levels or ((layout.size("Y"), layout.size("X")),)


def level_of(layout: Layout, reading: Reading) -> tuple[int, float]:
    """Return the level to read and its pixels per pixel of the result.

    --mpp takes the coarsest level that is at least as fine as asked for; scale = mpp asked for / mpp of that level.
    Raises BadImage.
    """
    sizes = level_sizes(layout)
    if reading.mpp is None:
        level = reading.level or 0
        if level >= len(sizes):
            which = "only level 0" if len(sizes) == 1 else f"levels 0 to {len(sizes) - 1}"
            raise BadImage(f"--level {level}: {layout.what} has {which}; give --level {len(sizes) - 1} or less")
        return level, 1.0
    if layout.mpp is None:
        raise BadImage(f"--mpp {reading.mpp:g}: {layout.what} does not say how large its pixels are; give --level")
    scales = [reading.mpp / layout.mpp * (size[1] / sizes[0][1]) for size in sizes]
    if scales[0] < ENLARGED:
        raise BadImage(
            f"--mpp {reading.mpp:g}: {layout.what} has {layout.mpp:.4g} micrometers per pixel at its full size; "
            f"give --mpp {layout.mpp:.4g} or more"
        )
    level = max((k for k, scale in enumerate(scales) if scale >= 1), default=0)
    return level, scales[level]


def named(piece: Piece) -> str:
    """Return what follows a file's name: "level=0,x=1024,y=2048", in pixels of the level."""
    if piece.window is None:
        return f"level={piece.level}" if piece.level else ""
    top, left = (round(start * piece.scale) for start in piece.window[:2])
    return f"level={piece.level},x={left},y={top}"


def read_piece(read: ReadPiece, file: File, piece: Piece, layout: Layout) -> Stored:
    """Return a picture or window by a format's `read`, resized by the exact factor where `piece.scale` is not 1.

    Raises as `read`.
    """
    if piece.window is None or piece.scale == 1:
        return read(file, piece)
    around = outer(piece, layout)
    stored = read(file, around)
    assert around.window is not None
    top, left, height, width = around.window
    (y0, y1), (x0, x1) = _edges(piece)
    box = (x0 - left, y0 - top, min(x1 - left, width), min(y1 - top, height))
    return resized(stored, box, (piece.window[2], piece.window[3]))


def outer(piece: Piece, layout: Layout) -> Piece:
    """Return a window in pixels of its level, with the pixels around it that a resize reaches."""
    if piece.window is None or piece.scale == 1:
        return piece
    margin, sides = int(_MARGIN * max(1.0, piece.scale)), level_sizes(layout)[piece.level]
    (top, bottom), (left, right) = (
        (max(0, int(low) - margin), min(side, int(np.ceil(high)) + margin))
        for (low, high), side in zip(_edges(piece), sides, strict=True)
    )
    return replace(piece, window=(top, left, bottom - top, right - left), scale=1.0)


def _edges(piece: Piece) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return (top, bottom) and (left, right) of a window in pixels of its level."""
    assert piece.window is not None
    top, left, height, width = (value * piece.scale for value in piece.window)
    return (top, top + height), (left, left + width)


def resized(stored: Stored, box: tuple[float, float, float, float], size: tuple[int, int]) -> Stored:
    """Return the part (left, top, right, bottom) of a picture, antialiased bilinear, as (height, width) pixels.

    Nodata counts as the mean of the picture's valid values; a pixel is valid if most of what it covers is.
    """
    values, valid = stored.values, stored.valid
    if valid is not None and not valid.all():
        mean = values[:, valid].mean(1) if valid.any() else np.zeros(len(values))
        values = np.where(valid, values, mean[:, None, None].astype(values.dtype))
    mode = "L" if values.dtype == np.uint8 else "F"
    planes = [np.asarray(_resize(plane, mode, box, size)) for plane in values]
    result = np.stack(planes)
    if values.dtype.kind in "iu" and mode == "F":
        limits = np.iinfo(values.dtype)
        result = np.clip(np.rint(result.astype(np.float64)), limits.min, limits.max)
    if valid is not None:
        valid = np.asarray(_resize(valid.astype(np.float32), "F", box, size)) >= 0.5
    return replace(stored, values=result.astype(values.dtype), valid=valid)


def without_blank(
    tiles: Grid, layout: Layout, read: Callable[[Piece], Stored], has_data: Callable[[Piece], bool] | None = None
) -> Grid:
    """Return the tiles that are not blank: standard deviation of 1/255 of the range or more in any band.

    Measured on the coarsest level on which a tile has 8 pixels a side or more. read: one picture or window of the file.
    has_data: whether bytes are stored for a window. 8 bits have the range 0 to 255; others that between the percentiles
    0.5 and 99.5 of 64 tiles. Raises as `read`.
    """
    sizes = level_sizes(layout)
    at = tiles.piece.level
    shrink = [tiles.piece.scale * size[1] / sizes[at][1] for size in sizes]  # pixels per pixel of a tile
    side = min(tiles.tile, tiles.height, tiles.width)
    coarse = max((k for k in range(at, len(sizes)) if side * shrink[k] >= BLANK_SIDE), default=at)
    spread: _Spread = _Spread(tiles, read, has_data)
    if coarse == at:
        deviations = (spread.of_tile(piece) for piece in replace(tiles, kept=None))
        kept = np.fromiter(deviations, np.float64) >= spread.limit
    else:
        level = replace(tiles.piece, level=coarse, scale=1.0)
        kept = spread.of_level(level, sizes[coarse], shrink[coarse]) >= spread.limit
    return replace(tiles, kept=np.flatnonzero(kept).astype(np.int32))


@dataclass(frozen=True, eq=False)
class _Spread:
    """Standard deviations of tiles, the largest of all bands."""

    tiles: Grid
    read: Callable[[Piece], Stored]
    has_data: Callable[[Piece], bool] | None

    @cached_property
    def limit(self) -> float:
        """Return the smallest standard deviation of a tile that is not blank, in stored values."""
        chosen = replace(self.tiles, kept=None)
        pieces = [chosen[int(k)] for k in np.unique(np.linspace(0, len(chosen) - 1, 64).astype(int))]
        samples = []
        for piece in pieces:
            if self.has_data is None or self.has_data(piece):
                stored = self.read(piece)
                if stored.is_8_bit:
                    return 255 * BLANK
                samples.append(_valid_values(stored).ravel())
        values = np.concatenate(samples) if samples else np.zeros(0)
        low, high = np.percentile(values, (0.5, 99.5)) if len(values) else (0, 1)
        return max(float(high - low) * BLANK, float(np.finfo(np.float32).tiny))

    def of_tile(self, piece: Piece) -> float:
        if self.has_data is not None and not self.has_data(piece):
            return 0.0
        return float(_valid_values(self.read(piece)).std(1, dtype=np.float64).max(initial=0))

    def of_level(self, level: Piece, size: tuple[int, int], shrink: float) -> np.ndarray:
        """Return one number per tile, [N], row by row, from a coarser level. shrink: its pixels per pixel of a tile."""
        tiles = self.tiles
        columns = max(1, int(_BLOCK / (tiles.tile * shrink) / max(1.0, tiles.stride * shrink)))
        result = []
        for top in tiles.tops:
            rows = _span(top, min(tiles.tile, tiles.height), shrink, size[0])
            for first in range(0, len(tiles.lefts), columns):
                lefts = [
                    _span(left, min(tiles.tile, tiles.width), shrink, size[1])
                    for left in tiles.lefts[first : first + columns]
                ]
                start = lefts[0][0]
                window = (rows[0], start, rows[1] - rows[0], lefts[-1][1] - start)
                stored = self.read(replace(level, window=window))
                result += [_deviation(stored, low - start, high - start) for low, high in lefts]
        return np.array(result)


def _deviation(stored: Stored, left: int, right: int) -> float:
    part = replace(stored, values=stored.values[:, :, left:right], valid=_columns(stored.valid, left, right))
    return float(_valid_values(part).std(1, dtype=np.float64).max(initial=0))


def _columns(valid: np.ndarray | None, left: int, right: int) -> np.ndarray | None:
    return None if valid is None else valid[:, left:right]


def _valid_values(stored: Stored) -> np.ndarray:
    """Return the values that are not nodata, [C, N]; one zero a band if there are none."""
    values = stored.values.reshape(len(stored.values), -1)
    valid = np.isfinite(values).all(0)
    if stored.valid is not None:
        valid &= stored.valid.ravel()
    return values if valid.all() else values[:, valid] if valid.any() else np.zeros((len(values), 1))


def _span(start: int, size: int, shrink: float, limit: int) -> tuple[int, int]:
    """Return the whole pixels of a coarser level that a side of a tile covers, at least one."""
    low = min(int(start * shrink), limit - 1)
    return low, max(low + 1, min(limit, round((start + size) * shrink)))


def _resize(plane: np.ndarray, mode: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(plane, np.uint8 if mode == "L" else np.float32))
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
