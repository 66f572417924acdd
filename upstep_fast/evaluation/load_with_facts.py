"""A model in memory together with the facts of its features, for writers of features other than `embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upstep_fast.config.base import reading_of
from upstep_fast.data.sources.source import Source
from upstep_fast.evaluation.embeddings import job_of
from upstep_fast.evaluation.feature_model import FeatureModel, feature_model_of
from upstep_fast.evaluation.features import load_models
from upstep_fast.evaluation.load_options import configured
from upstep_fast.runtime.device import resolve


def load_with_facts(
    source: str | Path, model: str | Path | None, whiten: bool | str | Path | None, **options: Any
) -> tuple[FeatureModel, dict[str, Any]]:
    """Return the model of `upstep_fast.load`, and the facts of its features (feature_files/facts.py).

    source, model, whiten, options: as for `load`. Raises ConfigError.
    """
    config, own = configured(source, model, whiten, **options)
    compute = resolve(config.runtime.device, config.runtime.precision, config.runtime.implementation)
    no_images = Source((), reading=reading_of(config.data))
    job = job_of(config, own, compute, no_images, load_models(config))
    return feature_model_of(config, job.models, job.fitted), job.facts
