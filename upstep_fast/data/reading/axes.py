"""Axes of files: which pictures they hold, by `--slice` and `--axes`, and reading one of them.

    auto, all   each index of each axis but Y, X and C is a picture
    middle      of the stack the middle one, index size // 2; each index of the other axes
    max         the brightest value along the stack; each index of the other axes

The stack is Z, in a file without Z its frames F, else its time T.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from upstep_fast.config.reading import Reading
from upstep_fast.data.reading import tiles
from upstep_fast.data.reading.stored import Layout, Piece, Stored
from upstep_fast.errors import BadImage

_STACKS = "ZFT"
MAX_PIECES = 1_000_000  # of one file
_IN_PICTURE = "YXC"


@functools.lru_cache(maxsize=256)
def pieces(layout: Layout, reading: Reading) -> tuple[Piece, ...]:
    """Return the pictures of a file, in the order of its axes. Raises BadImage for `--axes` that do not fit."""
    named = renamed(layout, reading.axes)
    origin = dict(zip(named.axes, layout.axes, strict=True))  # the reader's name of each axis
    stack = next((axis for axis in _STACKS if named.size(axis) > 1), "")
    ranges: list[tuple[str, range]] = []
    common = Piece()
    for axis, size in zip(named.axes, named.shape, strict=True):
        if axis == stack and reading.slices == "middle":
            ranges.append((origin[axis], range(size // 2, size // 2 + 1)))
        elif axis == stack and reading.slices == "max":
            common = replace(common, maximum=(origin[axis], size))
        elif axis == "C" and origin[axis] != "C":
            common = replace(common, stacked=(origin[axis], size))
        elif axis not in _IN_PICTURE and size > 1:
            ranges.append((origin[axis], range(size)))
    if (count := math.prod(len(indices) for _, indices in ranges)) > MAX_PIECES:
        raise BadImage(f"{described(layout, reading)} holds {count:,} pictures, above the limit of {MAX_PIECES:,}")
    axes = [axis for axis, _ in ranges]
    places = itertools.product(*(indices for _, indices in ranges))
    return tuple(replace(common, at=tuple(zip(axes, place, strict=True))) for place in places)


def renamed(layout: Layout, axes: str | None) -> Layout:
    """Return a layout with its axes named by the user. Raises BadImage if the names do not fit."""
    if axes is None:
        return layout
    if len(axes) != len(layout.axes):
        raise BadImage(f"{described(layout)} has {len(layout.axes)} axes, --axes {axes} names {len(axes)}")
    if any(axes.find(axis) != layout.axes.find(axis) for axis in "YX"):
        raise BadImage(f"--axes {axes} moves Y or X of {described(layout)}; name the other axes only")
    return replace(layout, axes=axes)


def described(layout: Layout, reading: Reading | None = None) -> str:
    """Return a layout in words: "OME-TIFF ZCYX 5x3x64x48". reading: with the user's names of the axes."""
    axes = (reading and reading.axes) or layout.axes
    return f"{layout.what} {axes} {'x'.join(map(str, layout.shape))}"


def label(piece: Piece) -> str:
    """Return what tells a picture from others of its file, "z=12,t=3"; empty if nothing does."""
    words = [f"{axis.lower()}={index}" for axis, index in piece.at]
    words += [place] if (place := tiles.named(piece)) else []
    return ",".join(words)


def read(reader: Callable[[Piece], Stored], piece: Piece) -> Stored:
    """Return a picture: one that `reader` returns, or bands put together, or the brightest values of several."""
    if piece.maximum is not None:
        axis, size = piece.maximum
        alone = replace(piece, maximum=None)
        return _brightest(lambda index: read(reader, replace(alone, at=(*piece.at, (axis, index)))), size)
    if piece.stacked is not None:
        axis, size = piece.stacked
        alone = replace(piece, stacked=None)
        planes = [read(reader, replace(alone, at=(*piece.at, (axis, index)))) for index in range(size)]
        valid = [np.ones(p.values.shape[1:], bool) if p.valid is None else p.valid for p in planes]
        has_mask = any(p.valid is not None for p in planes)
        values = np.concatenate([p.values for p in planes])
        return replace(planes[0], values=values, valid=np.logical_and.reduce(valid) if has_mask else None)
    at = dict(piece.at)
    band = at.pop("C", None)  # a band that the user calls a slice
    stored = reader(replace(piece, at=tuple(at.items())))
    return stored if band is None else replace(stored, values=stored.values[band : band + 1])


def _brightest(plane: Callable[[int], Stored], size: int) -> Stored:
    """Return the brightest valid value of each pixel; of inverted values the smallest."""
    best = plane(0)
    for index in range(1, size):
        following = plane(index)
        if following.values.shape != best.values.shape or following.inverted != best.inverted:
            raise BadImage(f"slice {index} is of another size or photometric kind than the first: no maximum")
        best = _brighter(best, following)
    return best


def _brighter(a: Stored, b: Stored) -> Stored:
    low, high = _widest(a.low, b.low, min), _widest(a.high, b.high, max)
    if a.values.dtype.kind == "f":  # a band of a pixel may be NaN alone
        choose = np.fmin if a.inverted else np.fmax
        return Stored(choose(_with_nan(a), _with_nan(b)), low, high, None, a.inverted)
    is_brighter = b.values < a.values if a.inverted else b.values > a.values
    if b.valid is not None:
        is_brighter &= b.valid
    if a.valid is not None:
        is_brighter |= ~a.valid
    valid = None if a.valid is None or b.valid is None else a.valid | b.valid
    return Stored(np.where(is_brighter, b.values, a.values), low, high, valid, a.inverted)


def _with_nan(stored: Stored) -> np.ndarray:
    return stored.values if stored.valid is None else np.where(stored.valid, stored.values, np.nan)


def _widest(a: float | None, b: float | None, choose: Callable[[float, float], float]) -> float | None:
    return None if a is None or b is None else choose(a, b)
