"""What a run wants to know of its images before it starts: `--triage` and `--mean-std auto`, each done once.

Both are kept in the run's folder as JSON, with what they depend on, and read from there by a resume: a run goes on
with the images and the statistics it began with.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from upstep_fast.data.curation.triage import VERSION, Verdict, triage
from upstep_fast.data.keyed_random import bits_array
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped import check_bad, read_image
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import DataError

if TYPE_CHECKING:
    from upstep_fast.config.adapt import AdaptConfig
    from upstep_fast.model.backbone import Backbone

log = logging.getLogger("upstep_fast")

TRIAGE, STATISTICS = "triage.json", "statistics.json"
SAMPLE = 2000  # images that the statistics are of
MIN_STD = 1 / 255  # of a channel that does not vary
T = TypeVar("T")


def survey(
    config: AdaptConfig, source: Source, backbone: Backbone, num_workers: int
) -> tuple[AdaptConfig, Source, Backbone, dict[str, bytes]]:
    """The four of them after `--triage` and `--mean-std auto`: the last are files for the run's folder, by name.

    Measured statistics take the place of `auto` in the configuration that is saved, so that a resume, and whoever
    copies the next command, has the same numbers. Raises DataError.
    """
    files: dict[str, bytes] = {}
    options: dict[str, Any] = {
        "channels": len(backbone.mean),
        "num_workers": num_workers,
        "max_bad_fraction": config.max_bad_fraction,
    }
    if config.triage:
        source, files[TRIAGE] = without_copies_and_blanks(source, Path(config.out), **options)
    if config.mean_std == "auto":
        mean, std, files[STATISTICS] = mean_and_std(source, Path(config.out), **options)
        config = dataclasses.replace(config, mean_std="given", mean=mean, std=std)
        backbone = dataclasses.replace(backbone, mean=mean, std=std)
    return config, source, backbone, files


def without_copies_and_blanks(
    source: Source, folder: Path, *, channels: int, num_workers: int, max_bad_fraction: float
) -> tuple[Source, bytes]:
    """The source that `triage` leaves, and what folder/triage.json shall hold; read from there if it fits.

    Raises DataError when fewer than two images remain or too many are unreadable.
    """
    key = {"rules": VERSION, "data": source.fingerprint(), "channels": channels}

    def look() -> Verdict:
        log.info("triage: looking at %s images", f"{len(source):,}")
        options: dict[str, Any] = {"num_workers": num_workers, "max_bad_fraction": max_bad_fraction}
        return triage(source, channels=channels, **options)

    verdict, text = _once(folder / TRIAGE, key, look, Verdict.to_dict, Verdict.from_dict)
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
    """`channel_statistics`, and what folder/statistics.json shall hold; read from there if it fits."""
    key = {"sample": SAMPLE, "data": source.fingerprint(), "channels": channels}

    def measure() -> dict[str, list[float]]:
        options: dict[str, Any] = {"num_workers": num_workers, "max_bad_fraction": max_bad_fraction}
        mean, std = channel_statistics(source, channels=channels, **options)
        return {"mean": list(mean), "std": list(std)}

    def checked(values: dict[str, Any]) -> dict[str, list[float]]:
        found = {name: [float(v) for v in values[name]] for name in ("mean", "std")}
        if any(len(v) != channels for v in found.values()):
            raise ValueError("not one value a channel")
        return found

    found, text = _once(folder / STATISTICS, key, measure, dict, checked)
    shown = {name: " ".join(f"{v:.4f}" for v in values) for name, values in found.items()}
    log.info("mean of the images %s, std %s", shown["mean"], shown["std"])
    return tuple(found["mean"]), tuple(found["std"]), text


def channel_statistics(
    source: Source,
    *,
    channels: int = 3,
    sample: int = SAMPLE,
    num_workers: int = 0,
    max_bad_fraction: float = 0.01,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on a 0..1 scale, rounded to 1e-5.

        mean = E[m],   std^2 = E[q] - mean^2      m, q: mean and mean square of an image's channel

    Every image counts alike, whatever its size, as views are of one size. E is over `sample` images, the first by
    splitmix64(0, index), or all if there are no more. A channel that does not vary gets a std of 1/255. Raises
    DataError when too many of them, or all, are unreadable.
    """
    order = np.argsort(bits_array(0, np.arange(len(source), dtype=np.uint64)), kind="stable")[:sample]

    def moments(index: int) -> tuple[int, str | np.ndarray]:
        image = read_image(source, index, channels=channels)
        if isinstance(image, str):
            return index, image
        x = image.flatten(1).double() / 255
        return index, np.stack([x.mean(1).numpy(), x.square().mean(1).numpy()])

    found, bad = [], {}
    for index, moment in ordered_map(moments, sorted(order.tolist()), num_workers, 64):
        if isinstance(moment, str):
            bad[source.name(index)] = moment
            check_bad(bad, len(order), max_bad_fraction)
        else:
            found.append(moment)
    if not found:
        raise DataError(f"data: none of {len(order)} images can be read; the first: {next(iter(bad.items()))}")
    mean, square = np.mean(found, 0)
    std = np.sqrt(np.maximum(square - mean**2, MIN_STD**2))
    return tuple(round(float(v), 5) for v in mean), tuple(round(float(v), 5) for v in std)


def _once(
    path: Path, key: dict[str, Any], make: Callable[[], T], pack: Callable[[T], dict], unpack: Callable[[dict], T]
) -> tuple[T, bytes]:
    """What `path` holds under `key`, or else what `make` returns; and the file's text with it."""
    try:
        stored = json.loads(path.read_text())
        if stored["of"] == key:
            return unpack(stored["found"]), path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent, of other images or damaged: made anew
    found = make()
    return found, (json.dumps({"of": key, "found": pack(found)}, indent=1) + "\n").encode()
