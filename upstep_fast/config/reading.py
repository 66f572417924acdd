"""How images are read: brightness, axes, slices, bands and tiles. Values of flags, parsed and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from upstep_fast.errors import ConfigError

# flags of the data that features depend on as on the model: kept with a run, and taken from it by other commands
READING = ("intensity", "bands", "axes", "slice", "tiles", "level", "mpp")
NONE = "none"  # value of such a flag that stands for its absence, whatever the run has
INTENSITY = "auto, full, percentile:LO,HI, window:CENTER,WIDTH or range:LO,HI"
_MAX_BANDS = 64


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

    @property
    def keeps_photographs(self) -> bool:
        """Whether images of 8 bits have the pixels of their files."""
        is_as_stored = self.intensity.kind in ("auto", "full") or not self.intensity.ranges
        return is_as_stored and not self.bands and self.tile is None

    @property
    def is_windowed(self) -> bool:
        """Whether parts or levels of pictures are read."""
        return self.tile is not None or bool(self.level) or self.mpp is not None

    def described(self) -> dict[str, str]:
        """Return what features depend on, by flag. Pixels of 8 bits, and values without a measured range, tell none."""
        is_measured = self.intensity.ranges or self.intensity.kind != "auto"
        return ({"intensity": intensity_text(self.intensity)} if is_measured else {}) | {
            "bands": ",".join(map(str, self.bands)) or NONE,
            "axes": self.axes or NONE,
            "slice": self.slices,
            "tiles": str(self.tile or NONE),
            "level": str(self.level or NONE),
            "mpp": str(self.mpp or NONE),
        }


AS_STORED = Reading()  # by the declared range: auto without a measured one


def merged(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flags of READING: those given, and recorded ones of the others. level and mpp exclude each other."""
    own = {name: given[name] for name in READING if given.get(name) is not None}
    excluded = {other for name, other in (("level", "mpp"), ("mpp", "level")) if own.get(name, NONE) != NONE}
    return {name: value for name, value in recorded.items() if name not in excluded} | own


def parse_intensity(text: str) -> Intensity:
    """Return the map that --intensity names; `auto:LO,HI`, as config.toml has it, is auto with its measured range.

    Several ranges or windows, one per band, are joined by semicolons. Raises ConfigError.
    """
    kind, separator, values = text.strip().partition(":")
    if kind in ("auto", "full") and not separator:
        return Intensity(kind)  # type: ignore[arg-type]
    if kind not in ("auto", "percentile", "window", "range"):
        raise _refused(text, f"must be {INTENSITY}")
    pairs = [_pair(text, part) for part in values.split(";")]
    if kind == "percentile":
        low, high = pairs[0]
        if len(pairs) > 1 or not 0 <= low < high <= 100:
            raise _refused(text, "needs two percentiles in 0 to 100, the lower one first")
        return Intensity("percentile", (low, high))
    if kind == "window":
        pairs = [(center - width / 2, center + width / 2) for center, width in pairs]
    for low, high in pairs:
        if not (low < high and math.isfinite(high - low)):
            what = "a width above 0" if kind == "window" else "a lower value before a higher one"
            raise _refused(text, f"needs {what}")
    return Intensity("auto" if kind == "auto" else "range", ranges=tuple(pairs))


def intensity_text(intensity: Intensity) -> str:
    """Return the text that `parse_intensity` reads as an equal map; a measured percentile map is a range."""
    ranges = ";".join(f"{_number(low)},{_number(high)}" for low, high in intensity.ranges)
    if intensity.kind == "percentile" and not ranges:
        return "percentile:" + ",".join(map(_number, intensity.percentiles))
    kind = "range" if intensity.kind == "percentile" else intensity.kind
    return f"{kind}:{ranges}" if ranges else kind


def parse_bands(text: str | None) -> tuple[int, ...]:
    """Return the numbers of the bands that --bands names, () without it. Raises ConfigError."""
    if text is None:
        return ()
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text.strip()):
        raise ConfigError(f"bands: got {text}, must be numbers of bands from 1 on, as in 3,2,1")
    bands = tuple(map(int, text.split(",")))
    if not min(bands) >= 1 or len(bands) > _MAX_BANDS:
        raise ConfigError(f"bands: got {text}, must be 1 to {_MAX_BANDS} numbers of bands, from 1 on")
    return bands


def parse_tiles(text: str | None) -> tuple[int | None, int | None]:
    """Return the side and the stride that --tiles names, in pixels. Raises ConfigError."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", text.strip())
    if not match or not int(match[1]) or (match[2] is not None and not int(match[2])):
        raise ConfigError(f"tiles: got {text}, must be a side in pixels, or SIDE:STRIDE, as in 224:112")
    return int(match[1]), int(match[2]) if match[2] else None


def check_axes(axes: str | None) -> None:
    """Raise ConfigError unless `axes` names each axis once, with rows Y and columns X."""
    if axes is None:
        return
    if len(set(axes)) != len(axes) or not {"Y", "X"} <= set(axes) <= set("YXCZTFP"):
        raise ConfigError(
            f"axes: got {axes}, must be letters in the file's order, each once: Y rows, X columns, C bands, Z slices, "
            "T time, F frames, P positions; Y and X are needed, as in TZYX"
        )


def _pair(text: str, part: str) -> tuple[float, float]:
    try:
        first, second = map(float, part.split(","))
    except ValueError:
        raise _refused(text, f"must be {INTENSITY}; {part or 'nothing'} is not two numbers") from None
    if not (math.isfinite(first) and math.isfinite(second)):
        raise _refused(text, "needs finite numbers")
    return first, second


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(f"intensity: got {text}, {why}")
