"""Preparation of a run's images: triage (`--triage`) and channel statistics (`--mean-std auto`), each computed once.

Both are kept as JSON in the run's folder, with the key of what they depend on; a resumed run reads them from there and
continues with its images and statistics.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from upstep_fast import input_files
from upstep_fast.config.reading import intensity_text
from upstep_fast.data.curation.triage import VERSION, Verdict, level_counts, triage
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.skipped_images import SkippedImages, map_readable, read_image
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import ConfigError, DataError, first_line

log = logging.getLogger("upstep_fast")

TRIAGE, STATISTICS = "triage.json", "statistics.json"
SAMPLE = 2000  # images that the statistics are measured on
MIN_STD = 1 / 255  # of a constant channel
AHEAD = 64  # images in flight
T = TypeVar("T")


@dataclass(frozen=True)
class Survey:
    """Result of `survey`."""

    source: Source  # without the images that triage leaves out
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None  # measured mean and std, one per channel
    files: dict[str, bytes]  # for the run's folder, by name


def survey(
    source: Source,
    folder: Path,
    *,
    run_triage: bool,
    measure_statistics: bool,
    channels: int,
    num_workers: int,
    max_bad_fraction: float,
) -> Survey:
    """Apply triage and measure channel statistics, as asked; results in `folder` are reused. Raises DataError."""
    files: dict[str, bytes] = {}
    statistics = None
    options: dict[str, Any] = {
        "channels": channels,
        "num_workers": num_workers,
        "max_bad_fraction": max_bad_fraction,
    }
    if run_triage:
        source, files[TRIAGE] = without_copies_and_blanks(source, folder, **options)
    if measure_statistics:
        mean, std, files[STATISTICS] = mean_and_std(source, folder, **options)
        statistics = mean, std
    return Survey(source, statistics, files)


def without_copies_and_blanks(
    source: Source, folder: Path, *, channels: int, num_workers: int, max_bad_fraction: float
) -> tuple[Source, bytes]:
    """Return the source without copies and blank images, and the text of triage.json.

    A verdict of these images in `folder` is reused. Raises DataError when fewer than two images remain or too many are
    unreadable.
    """
    key = {"rules": VERSION, "data": source.fingerprint(), "channels": channels} | _read_by(source)

    def inspect() -> Verdict:
        log.info("triage: inspecting %s images", f"{len(source):,}")
        options: dict[str, Any] = {"num_workers": num_workers, "max_bad_fraction": max_bad_fraction}
        return triage(source, channels=channels, **options)

    def checked(values: dict[str, Any]) -> Verdict:
        verdict = Verdict.from_dict(values)
        if verdict.counts["images"] != len(source):
            raise ValueError(f"of {verdict.counts['images']} images, not {len(source)}")
        return verdict

    verdict, text = _reuse_or_compute(folder / TRIAGE, key, inspect, Verdict.to_dict, checked)
    log.info("triage: %s", verdict)
    kept = verdict.kept(len(source))
    if len(kept) < 2:
        raise DataError(
            f"data: triage leaves {len(kept)} of {len(source)} images ({verdict}); add images or --no-triage"
        )
    return subset(source, kept, verdict.problems(source)), text


def mean_and_std(
    source: Source, folder: Path, *, channels: int, num_workers: int, max_bad_fraction: float
) -> tuple[tuple[float, ...], tuple[float, ...], bytes]:
    """Return `channel_statistics` and the text of statistics.json; values of these images in `folder` are reused."""
    key = {"sample": SAMPLE, "data": source.fingerprint(), "channels": channels} | _read_by(source)

    def measure() -> dict[str, list[float]]:
        options: dict[str, Any] = {"num_workers": num_workers, "max_bad_fraction": max_bad_fraction}
        mean, std = channel_statistics(source, channels=channels, **options)
        return {"mean": list(mean), "std": list(std)}

    def checked(values: dict[str, Any]) -> dict[str, list[float]]:
        floats = {name: [float(v) for v in values[name]] for name in ("mean", "std")}
        if any(len(v) != channels for v in floats.values()):
            raise ValueError("not one value per channel")
        if not all(0 <= v <= 1 for v in floats["mean"]) or not all(MIN_STD / 2 < v <= 1 for v in floats["std"]):
            raise ValueError("a mean or std out of 0 to 1")
        return floats

    statistics, text = _reuse_or_compute(folder / STATISTICS, key, measure, dict, checked)
    words = {name: " ".join(f"{v:.4f}" for v in values) for name, values in statistics.items()}
    log.info("channel mean %s, std %s", words["mean"], words["std"])
    return tuple(statistics["mean"]), tuple(statistics["std"]), text


def channel_statistics(
    source: Source,
    *,
    channels: int = 3,
    sample: int = SAMPLE,
    num_workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation of each channel on a 0..1 scale, rounded to 1e-5.

        mean = E[m],   std^2 = E[q] - mean^2      m, q: mean and mean square of an image's channel

    All images have equal weight, whatever their size, as views are of one size. E is over `sample` images, the first
    by splitmix64(0, index), or all if there are no more. A constant channel gets a std of 1/255. Raises DataError when
    more than `max_bad_fraction` of them are unreadable, or all.
    """
    order = np.argsort(bits_array(0, np.arange(len(source), dtype=np.uint64)), kind="stable")[:sample]

    levels = np.arange(256) / 255

    def moments(index: int) -> np.ndarray:
        image = read_image(source, index, channels=channels)
        shares = level_counts(image) / (image.shape[1] * image.shape[2])
        return np.stack([shares @ levels, shares @ levels**2])

    skipped, indices = SkippedImages(), sorted(order.tolist())
    options: dict[str, Any] = {"num_workers": num_workers, "ahead": AHEAD, "max_bad_fraction": max_bad_fraction}
    of_images = [moment for _, moment in map_readable(moments, source, indices, skipped, **options)]
    if not of_images:
        first = next(iter(skipped.items()))
        raise DataError(f"data: none of {len(order)} images can be read; the first: {first}")
    mean, square = np.mean(of_images, 0)
    std = np.sqrt(np.maximum(square - mean**2, MIN_STD**2))
    return tuple(round(float(v), 5) for v in mean), tuple(round(float(v), 5) for v in std)


def _read_by(source: Source) -> dict[str, str]:
    """Return how values become pixels, for a key; nothing where it is as earlier versions did."""
    reading = source.reading
    if not reading.intensity.ranges and not reading.bands:
        return {}
    return {"intensity": intensity_text(reading.intensity), "bands": ",".join(map(str, reading.bands))}


def _reuse_or_compute(
    path: Path, key: dict[str, Any], make: Callable[[], T], pack: Callable[[T], dict], unpack: Callable[[dict], T]
) -> tuple[T, bytes]:
    """Return the value that `path` holds under `key`, or else that of `make`, and the file's text with it.

    A file that is damaged, or no regular file, is reported and not used.
    """
    if path.exists():
        try:
            stored = input_files.read_json(path, path.name)
            if stored["of"] == key:
                value = unpack(stored["found"])
                return value, _text(key, pack(value))
        except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged and is made again: %s", path, first_line(error))
    value = make()
    return value, _text(key, pack(value))


def _text(key: dict[str, Any], packed: dict[str, Any]) -> bytes:
    return (json.dumps({"of": key, "found": packed}, indent=1) + "\n").encode()
