"""Features of a run's images, for the commands that look through them; kept in RUN/features, which grows with them."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.config.adapter_folder import RUN_CONFIG, is_refused, run_folder
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.data.sources.source import Source, open_configured
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.embeddings import run_embed
from upstep_fast.evaluation.feature_files.changes import compared, warn_of_changed
from upstep_fast.evaluation.feature_files.facts import NONE, adapter_hash, parts_of, whitening_hash
from upstep_fast.evaluation.feature_files.folder import NameIndex, plans_of
from upstep_fast.evaluation.feature_files.moved import parse_moved
from upstep_fast.evaluation.feature_files.parquet import BASE, FEATURES, has_pyarrow
from upstep_fast.evaluation.feature_files.table import FeatureTable, read_features
from upstep_fast.evaluation.feature_model import FeatureModel, load
from upstep_fast.input_files import read_bytes, read_toml
from upstep_fast.runtime.atomic_file import probe

__all__ = ["BASE", "FOLDER", "data_of_run", "model_of", "read_or_embed"]

log = logging.getLogger("upstep_fast")

FOLDER = "features"  # of a run


def model_of(config: RunFeaturesConfig) -> FeatureModel:
    """Return the model of the run, with the adapter and whitening. Raises ConfigError."""
    how = config.runtime
    return load(config.run, device=how.device, precision=how.precision, implementation=how.implementation)


def read_or_embed(config: RunFeaturesConfig, base: bool = False) -> dict[str, FeatureTable]:
    """Return {"features": ...} of the run's images, and with `base` {"base": ...} of the same images in the same order.

    They are those of --features, else those in RUN/features, to which missing ones are added first. With --data they
    are those of its images, in its order, but for images that could not be read. Raises UpstepError.
    """
    columns = (FEATURES, BASE) if base else (FEATURES,)
    if config.features is not None:
        tables = {column: _read(config.features, column, config) for column in columns}
        if not len(tables[FEATURES]):
            raise DataError(f"features: {config.features} holds those of no image; embed other images")
        return _of_data(tables, _source(config), config.features) if config.data else tables
    if not Path(config.run).is_dir() or not has_pyarrow():
        return _not_kept(config, columns, 'a run\'s folder and pip install "upstep_fast[parquet]" keep them')
    folder, source = Path(config.run) / FOLDER, _source(config)
    if not _is_complete(folder, source, config):
        if reason := _unwritable(folder):
            return _not_kept(config, columns, reason)
        _embed_missing(config, folder)
    return _of_data({column: _read(folder, column, config) for column in columns}, source, folder)


def data_of_run(run: str | Path) -> tuple[str, ...]:
    """Return --data of a run's config.toml. Raises ConfigError if there is none."""
    if not (Path(run) / RUN_CONFIG).exists():
        reason = f"has no {RUN_CONFIG}, so it is not of a run" if Path(run).exists() else "does not exist"
        raise ConfigError(f"run: {run} {reason}; give the folder that adapt wrote (--out), or --data with a model")
    values = read_toml(Path(run) / RUN_CONFIG, "run")
    data = values.get("data", {}).get("paths") if isinstance(values.get("data"), dict) else values.get("data")
    if not isinstance(data, list) or not data or not all(isinstance(path, str) for path in data):
        raise ConfigError(f"data: {Path(run) / RUN_CONFIG} names no images; give --data")
    return tuple(data)


def _embedding(config: RunFeaturesConfig, folder: Path | str) -> EmbedConfig:
    """Return the embed command that writes the run's features to `folder`; the images are read as in training."""
    how = config.runtime
    options: dict[str, Any] = {
        "model": config.run,
        "data": list(config.data or data_of_run(config.run)),
        "out": f"{folder}/",
        "with_base": True,
        "moved": config.moved,
        "batch_size": config.batch_size,
        "max_bad_fraction": config.max_bad_fraction,
        "device": how.device,
        "precision": how.precision,
        "implementation": how.implementation,
    }
    return from_options(EmbedConfig, options, "embed")


def _embed_missing(config: RunFeaturesConfig, folder: Path) -> None:
    """Run embed. Raises UpstepError, with the cures of a command that has no --out."""
    try:
        run_embed(_embedding(config, folder))
    except ConfigError as error:
        text = str(error).replace("choose another folder", "give others with --features")
        text = text.replace("choose another --out, or replace them with --overwrite", _again(config))
        raise ConfigError(f"features: {text.removeprefix('out: ')}" if text.startswith("out: ") else text) from error


def _unwritable(folder: Path) -> str:
    """Return why features cannot be kept in a folder; "" if they can."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is a file"
    try:
        probe(folder)
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"
    return ""


def _again(config: RunFeaturesConfig) -> str:
    command = f"upstep-fast embed {config.run} --data ... --with-base --overwrite --out {config.run}/{FOLDER}/"
    return f"embed again: {command}"


def _source(config: RunFeaturesConfig) -> Source:
    return open_configured(_embedding(config, FOLDER).data)


def _is_complete(folder: Path, source: Source, config: RunFeaturesConfig) -> bool:
    """Return whether the folder has the features of all images, or says that they cannot be read."""
    plans = plans_of(folder)
    if not plans or any(plan.missing() for plan in plans):
        return False
    _require_own(plans[-1].metadata, folder, config)
    new, changed = compared(source, plans, NameIndex.of(source), config.moved)
    if not len(new):  # else embed says it
        warn_of_changed(changed)
    return not len(new)


def _read(path: str | Path, column: str, config: RunFeaturesConfig) -> FeatureTable:
    table = read_features(path, column, parse_moved(config.moved))
    _require_own(table.facts, path, config)
    return table


def _require_own(facts: dict[str, Any], path: str | Path, config: RunFeaturesConfig) -> None:
    """Raise ConfigError if features are of another adapter or whitening than the run's. Loads no model."""
    then = parts_of(facts.get("fingerprint"))
    if not then or not Path(config.run).exists():
        return
    adapter = _embedding_adapter(config)
    file = run_folder(adapter) / whitening.FILE if adapter else None
    content = read_bytes(file, "whitening", whitening.MAX_BYTES) if file and file.exists() else None
    now = {"adapter": adapter_hash(None if is_refused(config.run) else adapter), "whitening": whitening_hash(content)}
    if then.get("whitening") == NONE:  # of --form plain, or of a run whose whitening came later
        now["whitening"] = NONE
    for name, value in now.items():
        if then.get(name) != value:
            raise ConfigError(
                f"features: {path} has those of another {name} than {config.run} ({then.get(name)}, now {value}); "
                f"{_again(config)}"
            )


def _embedding_adapter(config: RunFeaturesConfig) -> str | None:
    data = config.data or ("",)
    return from_options(EmbedConfig, {"model": config.run, "data": list(data), "out": FOLDER}, "embed").adapter


def _of_data(tables: dict[str, FeatureTable], source: Source, path: str | Path) -> dict[str, FeatureTable]:
    """Return the rows of the source's images, in its order. Raises DataError if there are none."""
    names = tables[FEATURES].names
    twice = f"features: two images in {path} are called", "embed them again under names of their own, or check --moved"
    positions = NameIndex(len(names), names.__getitem__, twice).find(source.name(i) for i in range(len(source)))
    rows = positions[positions >= 0]
    if not len(names):
        raise DataError(f"data: none of the {len(source):,} images could be read when {path} was written; repair them")
    if not len(rows):
        raise DataError(
            f"features: {path} has features of other images: the first is {names[0]}, that of "
            f"--data is {source.name(0)}; embed those of --data, or give --moved OLD=NEW if they have moved"
        )
    if lost := len(source) - len(rows):
        log.warning("features: %s has none of %s of %s images; left out", path, f"{lost:,}", f"{len(source):,}")
    return {column: _rows(table, rows) for column, table in tables.items()}


def _rows(table: FeatureTable, rows: np.ndarray) -> FeatureTable:
    if np.array_equal(rows, np.arange(len(table))):  # without a copy
        return table
    return FeatureTable(tuple(table.names[i] for i in rows), table.x[rows], table.facts)


def _not_kept(config: RunFeaturesConfig, columns: Sequence[str], reason: str) -> dict[str, FeatureTable]:
    """Return features that are kept nowhere: of a model that is no folder, without pyarrow, of a read-only run."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/features.safetensors"
        command = replace(_embedding(config, folder), out=out, with_base=BASE in columns, moved=())
        log.info("features: not kept; %s", reason)
        run_embed(command)
        return {column: read_features(out, column) for column in columns}
