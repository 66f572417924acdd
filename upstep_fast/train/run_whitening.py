"""The whitening in the folder of a run: of the base model's and the written adapter's features of training images.

    images = min(MOST, training images, SHARE x steps x batch)

An image passes twice through a model, forward only; in training two views pass forward and backward, four times or
more the work of one view's forward pass: with SHARE at a tenth this costs at most 5 % of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.loading.loader import permutation
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import RunFailedError, UpstepError, first_line
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import load_models, plain_features
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime import run_folder as output
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.commit import Content
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

SHARE = 0.1  # of the images of all steps
FEWEST, MOST = 100, 2048  # images; with fewer than 100 nothing was measured (bench/results/feature_forms_cpu.json)


def write_whitening(
    config: AdaptConfig,
    compute: Compute,
    source: Source,
    base: Backbone | None,
    identity: Mapping[str, Any],
    out: Path,
) -> None:
    """Write out/whitening.safetensors.

    source: the training images. base: the base model, on the first rank; identity: its `model_identity`. Collective.
    An error of the models is only logged, as the run itself is complete. Raises RunFailedError if the disk refuses.
    """
    content = None
    if distributed.is_first() and base is not None and config.output.whitening != "off":
        num = num_images(len(source), config.optimization.num_steps * config.optimization.batch_size)
        some = subset(source, np.sort(permutation(len(source), config.runtime.seed, 0)[:num]))
        content = _fitted(config, compute, some, base, identity, out) if num >= FEWEST else None
        if num < FEWEST:
            log.info("whitening: none: %s", _too_few(len(source)))
    if content is not None:
        with output.writing(out):
            write_atomic(out / whitening.FILE, content)
    distributed.gather(None)  # the other ranks wait here, with the limit of the start


def num_images(available: int, trained: int) -> int:
    """Return the number of images to fit to. trained: images of all steps."""
    return min(MOST, available, int(SHARE * trained))


def _too_few(available: int) -> str:
    if available < FEWEST:
        return f"{available} images are too few to fit it to"
    return f"the run is too short to spend 5 % of it on {FEWEST} images; embed --fit-whitening fits one"


def _fitted(
    config: AdaptConfig, compute: Compute, source: Source, base: Backbone, identity: Mapping[str, Any], out: Path
) -> Content | None:
    """Return the content of whitening.safetensors; None, after a warning, if the models fail."""
    described = replace(config.model, mean=None, std=None)  # the base model has them
    embedding = EmbedConfig(described, config.data, out="", adapter=str(out / "adapter"), any_base=True)
    try:
        models = load_models(embedding, backbone=base)
        vits = [model.vit.to(compute.device) for model in models.values()]
        with track("whitening", len(source)) as task:
            read, rows = plain_features(source, base, vits, compute, config.data.num_workers, _parts, task)
        fitted = {name: whitening.fit(_finite(x)) for name, x in zip(models, rows, strict=True)}
        identity = {**identity, whitening.READING: source.reading.described()}
        fingerprints = whitening.fingerprints_of(identity["sha256"], embedding.adapter)
    except (UpstepError, RuntimeError) as error:
        log.warning("whitening: none (%s)", first_line(error))
        return None
    log.info("whitening: fitted to %d training images, for embed: %s", len(read), out / whitening.FILE)
    return whitening.content(fitted, fingerprints, identity)


def _parts(vit: Any, images: Tensor) -> Tensor:
    return pooling.pooled_and_patch_mean(vit, vit.forward_features(images))


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise RunFailedError("features of training images are not finite")
    return x
