"""Intensity of a run's images: measured before training, kept in its configuration, or as an earlier version had it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from upstep_fast import input_files
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import RUN_CONFIG
from upstep_fast.config.files import flatten_tables
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import flat, replace_flat
from upstep_fast.config.reading import intensity_text
from upstep_fast.config.run_reading import log_of_adapter
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError
from upstep_fast.runtime import checkpoint
from upstep_fast.runtime.run_folder import CHECKPOINTS

C = TypeVar("C", AdaptConfig, FinetuneConfig)


def as_recorded(config: C) -> C:
    """Return the configuration of a run, with intensity full if it resumes one of an earlier version.

    Another one that is given stays, and is refused as a changed flag.
    """
    if not config.output.resume or config.data.intensity is not None:
        return config
    recorded = _recorded(Path(config.output.out), type(config))
    return config if recorded is None or "intensity" in recorded else replace_flat(config, intensity="full")


def _recorded(out: Path, config_class: type) -> dict[str, Any] | None:
    """Return the flags of the run to continue: of its checkpoint, or of config.toml, which users edit, before one."""
    manifest = checkpoint.recorded(out / CHECKPOINTS)
    if manifest is not None:
        flags = manifest.get("config")
        return flags if isinstance(flags, dict) else None  # refused where the checkpoint is read
    if not (out / RUN_CONFIG).is_file():  # no run to continue
        return None
    try:
        return flatten_tables(input_files.read_toml(out / RUN_CONFIG, "resume"), config_class)
    except ConfigError:  # the run starts anew, and writes it again
        return None


def with_intensity(config: C, source: Source, channels: int) -> tuple[C, Source]:
    """Return configuration and source with the range of intensity, measured if there is none yet."""
    flags = flat(config)
    log_of_adapter(flags.get("adapter") or flags.get("from_"), config.data)
    source = measure_intensity(source, channels=channels, workers=config.data.num_workers)
    return replace_flat(config, intensity=intensity_text(source.reading.intensity)), source


def with_intensity_of_splits(config: FinetuneConfig, splits: Any, channels: int) -> tuple[FinetuneConfig, Any]:
    """Return configuration and `Splits` with the range of intensity, measured on the images to learn from."""
    images = splits.learn.source if config.frames is None else splits.learn.source.source
    if images is None:  # videos
        return config, splits
    config, images = with_intensity(config, images, channels)
    parts = {name: getattr(splits, name).with_reading(images.reading) for name in ("learn", "choose", "test")}
    return config, replace(splits, **parts)
