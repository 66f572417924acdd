"""An image as its file declares it: the axes, one picture's place in them, and its values with their range."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from upstep_fast.errors import BadImage

MAX_PIXELS = 178_956_970  # of one picture or window, Pillow's limit for an error; a 27 kB PNG can claim more
File = bytes | memoryview | str  # encoded content, or the path of a regular file (of a folder for OME-Zarr)


@dataclass(frozen=True)
class Layout:
    """Axes of a file's values, from its header."""

    axes: str  # in the file's order: Y rows, X columns, C bands, Z slices, T time, F frames, P positions or scenes
    shape: tuple[int, ...]  # sizes, one per axis
    what: str  # for messages: "DICOM CT, 12 bits"
    levels: tuple[tuple[int, int], ...] = ()  # (height, width) of a pyramid's levels, full size first; (): one level
    mpp: float | None = None  # micrometers per pixel of the full size
    # of a file that is a part of a series, its name and the place in it; equal layouts may differ in them
    series: str = field(default="", compare=False)
    number: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check the axes. Raises ValueError."""
        names = set(self.axes)
        if len(self.axes) != len(self.shape) or len(names) != len(self.axes) or not {"Y", "X"} <= names:
            raise ValueError(f"axes {self.axes!r} of shape {self.shape}")

    def size(self, axis: str) -> int:
        """Return the size along an axis; 1 for one that is not there."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1

    def window(self, piece: Piece) -> tuple[int, int, int, int]:
        """Return a piece's window (top, left, height, width); the whole level without one.

        Raises BadImage for a level, place or window outside the file, and for more than MAX_PIXELS pixels.
        """
        levels = self.levels or ((self.size("Y"), self.size("X")),)
        if not 0 <= piece.level < len(levels):
            raise BadImage(f"level {piece.level} of a file with {len(levels)} levels")
        for axis, index in piece.at:
            if not 0 <= index < self.size(axis):
                raise BadImage(f"{axis}={index} of a file with {self.size(axis)} along {axis}")
        rows, columns = levels[piece.level]
        top, left, height, width = piece.window or (0, 0, rows, columns)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
            raise BadImage(f"a window of {height} x {width} at {top}, {left} in {rows} x {columns} pixels")
        if height * width > MAX_PIXELS:
            fits = next((k for k, (h, w) in enumerate(levels) if h * w <= MAX_PIXELS), None)
            cure = "" if fits is None else f", or --level {fits} ({levels[fits][1]} x {levels[fits][0]} pixels)"
            raise BadImage(f"{width} x {height} pixels, above the limit of {MAX_PIXELS}; give --tiles 224{cure}")
        return top, left, height, width


@dataclass(frozen=True)
class Piece:
    """One picture in a file: its place on every axis but Y, X and C, and optionally a window of one level."""

    at: tuple[tuple[str, int], ...] = ()  # (axis, index); axes left out: index 0
    window: tuple[int, int, int, int] | None = None  # top, left, height, width in pixels of the level; None: all
    level: int = 0
    maximum: tuple[str, int] | None = None  # (axis, size): the brightest values along it
    stacked: tuple[str, int] | None = None  # (axis, size): its pictures are the bands
    scale: float = 1.0  # pixels of the level per pixel of the result, the unit of `window`; readers see 1 (tiles.py)

    def index(self, axis: str) -> int:
        """Return the place on an axis."""
        return dict(self.at).get(axis, 0)


WHOLE = Piece()  # the first picture


@dataclass(frozen=True, eq=False)
class Stored:
    """Values of one picture, with what its file says about them.

    Physical values where the file defines them (rescale slope, BZERO, per-frame rescale), stored ones otherwise.
    """

    values: np.ndarray  # [C, H, W], integers or floats in native byte order
    low: float | None = None  # declared range, inclusive: 0 and 4095 of 12 bits; None: none is declared (floats)
    high: float | None = None
    valid: np.ndarray | None = None  # [H, W] bool, False: nodata; None: all True. NaN is invalid too
    inverted: bool = False  # low values are white (MONOCHROME1, MINISWHITE)
    colors: int = 0  # bands at the start that are RGB or gray, where others follow (alpha, infrared); 0: all are alike

    @property
    def is_8_bit(self) -> bool:
        """Whether the values are pixels as they are."""
        return self.values.dtype == np.uint8 and (self.low, self.high) == (0, 255)


@dataclass(frozen=True)
class Values:
    """Values that are read on demand, from a header that was checked."""

    num_bytes: int  # memory that reading and mapping them takes at most
    read: Callable[[], Stored]  # raises BadImage, or its library's error for a broken file
