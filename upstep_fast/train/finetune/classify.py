"""Classes of images by a fine-tuned model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from upstep_fast.config.base import DataConfig
from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import ConfigError, DataError, RunFailedError
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")


@dataclass(frozen=True)
class Predicted:
    """Classes of the readable images of a source."""

    indices: list[int]  # positions in the source, [n]
    likeliest: Tensor  # [n, k] int64, classes from the likeliest on
    probability: Tensor  # [n, k] fp32, of these


class Prediction(NamedTuple):
    """Likeliest class of one image."""

    path: str
    label: str
    probability: float


def predict_paths(
    net: Any,
    backbone: Backbone,
    data: str | Path | Sequence[str | Path],
    *,
    batch_size: int = 64,
    num_workers: int | None = None,
    reading: Reading = AS_STORED,
) -> list[Prediction]:
    """Return path, class and probability of every readable image of `data`, in the order of the source.

    data: a path or several, as `upstep-fast predict --data` takes them. The model runs in fp32 on the device where it
    is, by the evaluation transform of its base model. num_workers: threads; None: one per core, at most 16. reading:
    that of the training. Raises DataError for data that cannot be used, ConfigError for a model of clips.
    """
    if net.frames > 1:
        raise ConfigError("predict: the model classifies clips; call it on clips [B, T, C, H, W]")
    device, was_training = net.head.weight.device, net.training
    source = measure_intensity(open_source(data, reading=reading), channels=len(backbone.mean), workers=num_workers)
    config = DataConfig(paths=(), num_workers=num_workers)
    try:
        found = classify(net.eval(), backbone, source, resolve(str(device), "fp32"), batch_size, config)
    finally:
        net.train(was_training)
    rows = zip(found.indices, found.likeliest[:, 0].tolist(), found.probability[:, 0].tolist(), strict=True)
    return [Prediction(source.name(index), net.classes[label], p) for index, label, p in rows]


@torch.no_grad()
def classify(
    net: Any,
    backbone: Backbone,
    source: Source,
    compute: Compute,
    batch_size: int,
    config: DataConfig,
    count: int = 1,
) -> Predicted:
    """Return the `count` likeliest classes of every readable image.

    net: the classifier, on the device of `compute`. Raises DataError, and RunFailedError for logits of NaN or infinity.
    """
    count, skipped = min(count, len(net.classes)), SkippedImages()
    batches = load_images(
        source,
        **backbone.eval_transform_args,
        batch_size=batch_size,
        num_workers=config.num_workers,
        max_bad_fraction=config.max_bad_fraction,
        skipped=skipped,
    )
    indices: list[int] = []
    parts: list[tuple[Tensor, Tensor]] = []
    with track("predict", len(source)) as task:
        for at, images in batches:
            with compute.autocast():
                logits = net(backbone.normalized(images, compute.device)).float()
            _check_finite(logits, at, source)
            probability, likeliest = logits.softmax(1).topk(count)
            parts.append((probability.cpu(), likeliest.cpu()))
            indices += at.tolist()
            task.advance(len(at))
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    if not indices:
        first = next(iter(skipped.items()))
        raise DataError(f"data: none of the {len(source)} images could be read; the first: {first}")
    probability, likeliest = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Predicted(indices, likeliest, probability)


def _check_finite(logits: Tensor, indices: Tensor, source: Source) -> None:
    """Raise RunFailedError naming an image whose logits are not finite. logits: [B, K]."""
    if not (finite := logits.isfinite().all(1).cpu()).all():
        name = source.name(int(indices[~finite][0]))
        raise RunFailedError(f"run: the logits of {name} are not finite; use --precision fp32")
