"""Range of intensity of a data set, measured once on a sample of its images.

    LO, HI = percentiles 0.5 and 99.5 (or those asked for) over values of a sample of images

The sample is of at most 256 images, the first by splitmix64(0, index), and of each at most 16,384 values at places that
are a hash of the image's index, without nodata, NaN and infinity. For `auto` only images of more than 8 bits count. One
range for images of 1 or 3 bands, colors; otherwise one for each band. A range depends on the data alone, so all ranks
and a resumed run measure the same one.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np

from upstep_fast.config.reading import Intensity
from upstep_fast.data.decode.image import one_reason, read_stored
from upstep_fast.data.decode.piece import num_values, stored_piece
from upstep_fast.data.decode.values import may_be_deep
from upstep_fast.data.formats import kinds
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.skipped_images import SkippedImages, map_readable, read_item
from upstep_fast.data.reading.budget import BYTES_PER_VALUE, decoding
from upstep_fast.data.reading.intensity import chosen_bands, valid_values
from upstep_fast.data.reading.stored import Stored
from upstep_fast.data.sources.part import Item, read_image_file, read_start
from upstep_fast.data.sources.source import Source
from upstep_fast.runtime.machine import num_workers
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

SAMPLE = 256  # images
VALUES = 16_384  # of an image
_AHEAD = 32  # images in flight
_LOOKED_AT = 8  # images that tell whether a data set has more than 8 bits


@dataclass(frozen=True)
class _Sample:
    """Values of one image, [bands, n], and the fraction of them that is not valid."""

    values: np.ndarray
    invalid: float


def measure_intensity(source: Source, *, channels: int, workers: int | None = None) -> Source:
    """Return a source whose intensity has its range, measured if it has none yet; logs what it is.

    Images that cannot be read are passed over here: the loader counts them. workers: threads; None: one per core.
    """
    intensity = source.reading.intensity
    if intensity.ranges:
        return source
    if intensity.kind == "full":
        if _samples(source, channels, workers, _LOOKED_AT):
            log.info("intensity: full: values of more than 8 bits by their declared range; auto measures one")
        return source
    samples = _samples(source, channels, workers, SAMPLE)
    if not samples:
        return source
    ranges = _ranges(samples, intensity.percentiles)
    _log(ranges, samples, intensity)
    reading = dataclasses.replace(source.reading, intensity=dataclasses.replace(intensity, ranges=ranges))
    return dataclasses.replace(source, reading=reading)


def _samples(source: Source, channels: int, workers: int | None, count: int) -> list[_Sample]:
    """Return values of a sample of images: those beyond 8 bits, or all for `percentile`."""
    every = source.reading.intensity.kind == "percentile"
    order = np.argsort(bits_array(0, np.arange(len(source), dtype=np.uint64)), kind="stable")[:count]

    def read(index: int) -> _Sample | None:
        stored = _stored(read_item(source, index), source, channels, every)
        return None if stored is None or (stored.is_8_bit and not every) else _values(stored, index)

    found = []
    with track("intensity", len(order)) as task:
        for _, sample in map_readable(
            read,
            source,
            sorted(order.tolist()),
            SkippedImages(),
            num_workers=num_workers(workers),
            ahead=_AHEAD,
            max_bad_fraction=1.0,
        ):
            task.advance()
            if sample is not None:
                found.append(sample)
    return found


def _stored(item: Item, source: Source, channels: int, every: bool) -> Stored | None:
    reading = source.reading
    if item.kind in (None, kinds.PHOTOGRAPH):  # of tiles, the whole picture
        data = item.file
        if isinstance(data, str):  # perhaps a large one, of many tiles
            if not every and not may_be_deep(read_start(data)):
                return None
            data = read_image_file(data)
        stored = read_stored(data, channels=channels, reading=reading, photographs=every)
    else:
        with decoding.hold(BYTES_PER_VALUE * num_values(item.layout, item.piece)), one_reason(b"", ""):
            stored = stored_piece(item.kind, item.file, item.piece, item.layout)
    return stored if stored is None else chosen_bands(stored, reading, channels)


def _values(stored: Stored, index: int) -> _Sample:
    valid = valid_values(stored)
    bands, height, width = stored.values.shape
    count = height * width
    places = np.arange(count)
    if count > VALUES:
        places = (bits_array(1, index, np.arange(VALUES)) % np.uint64(count)).astype(np.int64)
    values = stored.values.reshape(bands, count)[:, places]
    if valid is None:
        return _Sample(values, 0.0)
    is_valid: np.ndarray = np.logical_and.reduce(valid.reshape(len(valid), count))
    return _Sample(values[:, is_valid[places]], 1 - float(is_valid.mean()))


def _ranges(samples: list[_Sample], percentiles: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    numbers = [len(sample.values) for sample in samples]
    bands = max(set(numbers), key=numbers.count)
    if bands in (1, 3):
        groups = [np.concatenate([s.values.reshape(-1) for s in samples if len(s.values) in (1, 3)])]
    else:
        groups = [np.concatenate([s.values[band] for s in samples if len(s.values) == bands]) for band in range(bands)]
    return tuple(_rounded(*np.percentile(values.astype(np.float64), percentiles).tolist()) for values in groups)


def _rounded(low: float, high: float) -> tuple[float, float]:
    """Return a range in six digits, or as many more as its ends have in common: 3,000,000,000 to 3,000,001,000."""
    largest = max(abs(low), abs(high))
    if not high - low > 1e-9 * largest:
        return low, low + max(1.0, 1e-6 * largest)
    digits = 6 + max(0, int(np.log10(largest / (high - low))))
    return float(f"{low:.{digits}g}"), float(f"{high:.{digits}g}")


def _log(ranges: tuple[tuple[float, float], ...], samples: list[_Sample], intensity: Intensity) -> None:
    low, high = intensity.percentiles
    by = f"percentiles {low:g} and {high:g} of {len(samples):,} images"
    words = [f"{_number(a)} to {_number(b)}" for a, b in ranges]
    if len(ranges) == 1:
        log.info("intensity: values %s become 0 to 1 (%s)", words[0], by)
    else:
        log.info("intensity: values of %d bands become 0 to 1, %s (%s)", len(ranges), ", ".join(words), by)
    invalid = np.mean([sample.invalid for sample in samples])
    if invalid > 0:
        log.info(
            "intensity: %.1f %% of the values are nodata or not finite; they get their image's median", 100 * invalid
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"
