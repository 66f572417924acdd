"""How images are read: brightness, axes, slices, bands and tiles. Values of flags, parsed and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Intensity:
    """Map of stored values to 0..1, before 8 bits.

    auto         8 bits as they are; others between percentiles 0.5 and 99.5, measured once on a sample of the data set
    full         the range that the file declares
    percentile   between two percentiles, measured once on a sample of the data set
    range        between two values; window:CENTER,WIDTH is range:CENTER-WIDTH/2,CENTER+WIDTH/2
    """

    kind: Literal["auto", "full", "percentile", "range"] = "auto"
    percentiles: tuple[float, float] = (0.5, 99.5)
    ranges: tuple[tuple[float, float], ...] = ()  # given or measured: one for all bands, or one per band; (): not yet


@dataclass(frozen=True)
class Reading:
    """Choices of a user about files whose values or axes are not those of photographs."""

    intensity: Intensity = Intensity()
    axes: str | None = None  # meaning of a file's axes, e.g. "TZYX", where the file does not say or is wrong
    slices: Literal["auto", "middle", "all", "max"] = "auto"  # auto: all; of animations the first
    bands: tuple[int, ...] = ()  # numbers of the bands to read, from 1 on, in this order; (): all
    tile: int | None = None  # side in pixels; None: whole pictures
    stride: int | None = None  # None: the tile's side
    level: int | None = None  # of a pyramid; None: 0, or the one for `mpp`
    mpp: float | None = None  # micrometers per pixel wanted
