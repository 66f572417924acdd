"""Stored values of a picture as pixels of 8 bits, by one range for all images of a data set.

    range LO,HI     y = round(255 min(max((v - LO) / (HI - LO), 0), 1))         half to even, in float64
    full, integers  y = floor(256 (v - low) / n)     n = high - low + 1 declared levels, n >= 256
                    y = floor(255 (v - low) / (n - 1))                             fewer levels
    full, floats    the range that the file declares, as above; refused where it declares none
    invalid         NaN, infinity and nodata become the median of the valid pixels of their band
    inverted        255 - y, last: the range is one of stored values

For unsigned integers of b bits, `full` is v >> (b - 8): the upper eight bits. `auto` and `percentile` are `full` until
a range was measured (data/curation/intensity.py); `auto` leaves pixels of 8 bits as they are.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.reading import Intensity, Reading
from upstep_fast.data.reading.stored import Stored
from upstep_fast.errors import BadImage
from upstep_fast.runtime.terminal import counted

_STRIP = 1 << 20  # values that are computed in float64 at once


def to_pixels(stored: Stored, reading: Reading, channels: int) -> Tensor:
    """Return a picture as uint8 [channels, H, W]: the bands chosen, in 8 bits; one band stands for all channels.

    Raises BadImage for another number of bands, and as `to_bytes`.
    """
    bands = select_bands(stored, reading.bands)
    check_bands(len(bands.values), channels, reading.bands)
    return to_bytes(bands, reading.intensity).expand(channels, -1, -1)


def chosen_bands(stored: Stored, reading: Reading, channels: int) -> Stored:
    """Return a picture of the bands that --bands names; without it, of the colors, unless all bands are asked for.

    Raises BadImage.
    """
    if stored.colors and not reading.bands and len(stored.values) != channels:
        return select_bands(stored, tuple(range(1, stored.colors + 1)))
    return select_bands(stored, reading.bands)


def select_bands(stored: Stored, bands: tuple[int, ...]) -> Stored:
    """Return a picture of the bands of these numbers, from 1 on, in this order; () selects all. Raises BadImage."""
    if not bands:
        return stored
    require_bands(bands, len(stored.values))
    indices = [band - 1 for band in bands]
    return replace(stored, values=stored.values[indices])


def require_bands(bands: tuple[int, ...], count: int) -> None:
    """Raise BadImage unless a picture of `count` bands has all these."""
    if max(bands, default=0) > count:
        raise BadImage(f"has {counted(count, 'band')}; --bands asks for number {max(bands)}")


def check_bands(count: int, channels: int, bands: tuple[int, ...] = ()) -> None:
    """Raise BadImage unless `count` bands make an image of `channels`. bands: those that the user chose."""
    if count in (1, channels):
        return
    chosen = "--bands selects" if bands else "has"
    numbers = ",".join(str(n) for n in range(1, channels + 1)) if count > channels else "1"
    raise BadImage(f"{chosen} {count} bands, {channels} were asked for; give --bands {numbers} or --in-chans {count}")


def to_bytes(stored: Stored, intensity: Intensity) -> Tensor:
    """Return all bands of a picture as uint8 [C, H, W] by the formula above.

    Raises BadImage for a picture without a valid value, for floats without a range, and for a number of ranges that is
    not that of the bands.
    """
    ranges = intensity.ranges
    if intensity.kind == "full" or (intensity.kind == "auto" and stored.is_8_bit):
        ranges = ()
    if len(ranges) not in (0, 1, len(stored.values)):
        raise BadImage(f"{len(ranges)} ranges of --intensity for {len(stored.values)} bands; give one, or one per band")
    valid = valid_values(stored)
    y = np.empty(stored.values.shape, np.uint8)
    for band, values in enumerate(stored.values):
        y[band] = _mapped(values, ranges[band % len(ranges)]) if ranges else _full(values, stored)
        if valid is not None:
            y[band] = _filled(y[band], valid[band % len(valid)])
    return torch.from_numpy(255 - y if stored.inverted else y)


def gray_of(x: Tensor) -> Tensor:
    """Return ITU-R 601's luma of RGB, uint8 [3, H, W] -> [1, H, W], rounded as Pillow's convert("L")."""
    r, g, b = x.int()
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).to(torch.uint8)[None]


def valid_values(stored: Stored) -> np.ndarray | None:
    """Return which values of a picture are valid, bool [1 or C, H, W]; None: all. Raises BadImage if none is."""
    valid = None if stored.valid is None else stored.valid[None]
    if stored.values.dtype.kind == "f":
        finite = np.isfinite(stored.values)
        if not finite.all():
            valid = finite if valid is None else finite & valid
    if valid is None or valid.all():
        return None
    if not valid.any((1, 2)).all():
        raise BadImage("holds no valid value: all of it, or of one band, is nodata or NaN")
    return valid


def map_range(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return y of a range for values of any shape, uint8; NaN becomes 0."""
    with np.errstate(invalid="ignore"):
        x = (values.astype(np.float64) - low) / (high - low)
        return np.rint(255 * np.nan_to_num(np.clip(x, 0, 1))).astype(np.uint8)


def _full(values: np.ndarray, stored: Stored) -> np.ndarray:
    low, high = stored.low, stored.high
    if low is None or high is None or not low < high:
        raise BadImage(f"an array of {values.dtype} with no declared range: give --intensity range:LO,HI")
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    if values.dtype.kind == "f":
        return _mapped(values, (low, high))
    levels = int(high) - int(low) + 1
    factor, divisor = (256, levels) if levels >= 256 else (255, levels - 1)
    if values.dtype.kind == "u" and low == 0 and levels & (levels - 1) == 0 and levels >= 256:
        shift = levels.bit_length() - 9
        return np.minimum(values >> np.array(shift, values.dtype), 255).astype(np.uint8)
    wide = np.int64 if levels < 1 << 54 and values.dtype != np.uint64 else np.float64
    y = np.empty(values.shape, np.uint8)
    for rows in _strips(values):
        # exact up to 54 bits; what wider integers lose is far below one of 256 levels
        x = np.clip(values[rows].astype(wide), int(low), int(high))
        y[rows] = np.minimum((x - int(low)) * factor // divisor, 255)
    return y


def _mapped(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    low, high = float(limits[0]), float(limits[1])
    is_narrow = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
    table = _table(values.dtype.str, low, high) if is_narrow else None
    y = np.empty(values.shape, np.uint8)
    for rows in _strips(values):
        strip = values[rows]
        y[rows] = map_range(strip, low, high) if table is None else table[strip.view(f"u{strip.dtype.itemsize}")]
    return y


@functools.lru_cache(maxsize=32)
def _table(dtype: str, low: float, high: float) -> np.ndarray:
    """Return y of every value of an integer type of at most 16 bits, by its pattern read as unsigned."""
    size = np.dtype(dtype).itemsize
    patterns = np.arange(1 << 8 * size, dtype=f"u{size}")
    return map_range(patterns.view(dtype), low, high)


def _strips(values: np.ndarray) -> list[slice]:
    height, width = values.shape
    rows = max(1, _STRIP // max(1, width))
    return [slice(top, top + rows) for top in range(0, height, rows)]


def _filled(y: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return pixels with the lower median of the valid ones where they are not valid."""
    ends = np.bincount(y[valid], minlength=256).cumsum()
    return np.where(valid, y, np.uint8(np.searchsorted(ends, (ends[-1] + 1) // 2)))
