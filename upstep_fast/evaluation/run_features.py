"""Features of a run's images, for the commands that look through them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from upstep_fast.config.adapter_folder import RUN_CONFIG
from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation.feature_model import FeatureModel, load
from upstep_fast.evaluation.feature_table import FEATURES, FeatureTable, read_features
from upstep_fast.input_files import read_toml

BASE = "base"  # the column of the base model's plain features


def model_of(config: RunFeaturesConfig) -> FeatureModel:
    """Return the model of the run, with the adapter and whitening. Raises ConfigError."""
    how = config.runtime
    return load(config.run, device=how.device, precision=how.precision, implementation=how.implementation)


def read_or_embed(config: RunFeaturesConfig, base: bool = False) -> dict[str, FeatureTable]:
    """Return {"features": ...} of the run's images, and with `base` {"base": ...} of the same images in the same order.

    Raises UpstepError.
    """
    columns = (FEATURES, BASE) if base else (FEATURES,)
    if config.features is not None:
        return {column: read_features(config.features, column) for column in columns}
    data = list(config.data or data_of_run(config.run))
    model = model_of(config)
    names = tuple(name for path in data for name in model.paths(path))
    models = {FEATURES: model} | ({BASE: load(model.backbone.name)} if base else {})
    x = {column: [one.embed(path, config.batch_size) for path in data] for column, one in models.items()}

    return {column: FeatureTable(names, np.concatenate(parts), {}) for column, parts in x.items()}


def data_of_run(run: str | Path) -> tuple[str, ...]:
    """Return --data of a run's config.toml. Raises ConfigError if there is none."""
    values = read_toml(Path(run) / RUN_CONFIG, "run")
    data = values.get("data", {}).get("paths") if isinstance(values.get("data"), dict) else values.get("data")
    if not isinstance(data, list) or not data or not all(isinstance(path, str) for path in data):
        raise ConfigError(f"data: {Path(run) / RUN_CONFIG} names no images; give --data")
    return tuple(data)
