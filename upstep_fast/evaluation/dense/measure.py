"""eval --masks: segmentation by nearest neighbors of the base model's and the adapted patch tokens.

Images of the train part give the bank: their tokens, each with the most frequent class of its patch, at most BANK of
them, as many of each image. Images of the test part are segmented and compared pixel by pixel with their masks, as the
model sees both: after the evaluation transform.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.config.base import reading_of
from upstep_fast.config.evaluate import EvalConfig
from upstep_fast.config.run_reading import log_of_adapter
from upstep_fast.data.curation.intensity import measure_intensity
from upstep_fast.data.labeled.masks import Masked, open_masks, pair
from upstep_fast.data.labeled.splits import HeldOut, choose_test
from upstep_fast.data.loading.skipped_images import SkippedImages, map_readable
from upstep_fast.data.sources.source import Source, columns_of, open_source
from upstep_fast.data.sources.subset import subset
from upstep_fast.data.views.resize import eval_resize, eval_resize_labels
from upstep_fast.errors import ConfigError, DataError, NoTestPartError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.dense.segmentation import (
    IGNORED,
    counts_of,
    iou_of,
    knn_votes,
    label_maps,
    miou_of,
    on_grid_area,
    patch_labels,
    pixel_accuracy_of,
)
from upstep_fast.evaluation.dense.tokens import append_whitened, grid_of, on_grid
from upstep_fast.evaluation.features import check_finite, feature_function, load_models
from upstep_fast.evaluation.figures import with_intervals
from upstep_fast.evaluation.intervals import Jackknife, Values
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed, machine
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

BANK = 1 << 17  # tokens
BATCH = 32  # images


def measure_segmentation(config: EvalConfig, compute: Compute) -> dict[str, Any]:
    """Return the measures of eval --masks: {model: {"miou", "miou_whitened", "pixel_accuracy", ...}}, in percent.

    Beside them "intervals" and "gains" (figures.py; jackknife over the images), "iou": {model: {class: percent}},
    "n_train", "n_test", "k". whitened: whitened tokens appended, fitted to those of the bank. Raises UpstepError.
    """
    if distributed.size() > 1:
        raise ConfigError("masks: are measured by one process; leave out torchrun")
    log_of_adapter(config.adapter, config.data)
    train, test = _parts(config)
    models = load_models(config)
    workers = config.data.num_workers
    reading = measure_intensity(train.source, channels=len(models["base"].mean), workers=workers).reading
    train, test = (replace(part, source=replace(part.source, reading=reading)) for part in (train, test))
    runs = {
        kind: feature_function(model, config.runtime.implementation, compute, pooling.patch_tokens)
        for kind, model in models.items()
    }
    encoder = _Encoder(models, runs, config, compute)
    bank, labels, n_train = _bank(train, encoder)
    fitted = {kind: whitening.fit(x[:, None]) for kind, x in bank.items()}
    counts, k = _segment(test, encoder, bank, labels, fitted), min(config.k, len(labels))
    n_test = len(next(iter(counts.values())))
    values: dict[str, dict[str, Values]] = {}
    for (kind, suffix), of_images in counts.items():
        values.setdefault(kind, {})[f"miou{suffix}"] = _jackknife(of_images, miou_of)
        values[kind][f"pixel_accuracy{suffix}"] = _jackknife(of_images, pixel_accuracy_of)
    result, details = with_intervals(values)
    iou = {kind: _by_class(of_images) for (kind, suffix), of_images in counts.items() if not suffix}
    return result | details | {"iou": iou, "n_train": n_train, "n_test": n_test, "k": k, "tokens": len(labels)}


@dataclass(frozen=True)
class _Encoder:
    """Models, and the functions that give their tokens."""

    models: dict[str, Backbone]
    runs: dict[str, Callable[[Tensor], Tensor]]
    config: EvalConfig
    compute: Compute

    @torch.no_grad()
    def batches(self, part: Masked, name: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield unit tokens [B, h, w, D] by model, and masks [B, H, W] int64 of the grid's area. Raises DataError."""
        base, skipped = self.models["base"], SkippedImages()
        crop = base.crop_pct, base.crop_mode

        def read(index: int) -> tuple[Tensor, Tensor]:
            image, mask = part.read(index, len(base.mean))
            image = eval_resize(image, base.img_size, base.interpolation, *crop)
            return image, eval_resize_labels(mask, base.img_size, *crop)

        data = self.config.data
        how: dict[str, Any] = {
            "num_workers": machine.num_workers(data.num_workers),
            "max_bad_fraction": data.max_bad_fraction,
        }
        readable = map_readable(read, part.source, range(len(part.source)), skipped, ahead=2 * BATCH, **how)
        with contextlib.closing(readable), track(name, len(part.source)) as task:
            while batch := list(itertools.islice(readable, BATCH)):
                indices = torch.tensor([index for index, _ in batch])
                x = base.normalized(torch.stack([image for _, (image, _) in batch]), self.compute.device)
                masks = torch.stack([mask for _, (_, mask) in batch]).long()
                yield (
                    self._tokens(x, part, indices),
                    on_grid_area(masks, grid_of(base), base.vit.patch_embed.patch_size),
                )
                task.advance(len(batch))
        for image, reason in skipped.items():
            log.warning("skipped %s: %s", image, reason)

    def _tokens(self, images: Tensor, part: Masked, indices: Tensor) -> dict[str, Tensor]:
        tokens = {}
        for kind, run in self.runs.items():
            with self.compute.autocast():
                x = F.normalize(run(images).float(), dim=-1).cpu()
            check_finite(x, kind, part.source, indices, self.compute)
            tokens[kind] = on_grid(x, self.models[kind])
        return tokens


def _bank(part: Masked, encoder: _Encoder) -> tuple[dict[str, Tensor], Tensor, int]:
    """Return tokens [M, D] by model and their labels [M], of at most BANK tokens, and the number of images."""
    generator = torch.Generator().manual_seed(encoder.config.runtime.seed)
    rows: dict[str, list[Tensor]] = {kind: [] for kind in encoder.models}
    labels, num_images, most = [], 0, max(1, BANK // len(part.source))
    patch = encoder.models["base"].vit.patch_embed.patch_size
    for tokens, masks in encoder.batches(part, "eval: train"):
        for of_image, label in enumerate(patch_labels(masks, patch).flatten(1)):
            counted = (label != IGNORED).nonzero()[:, 0]
            chosen = counted[torch.randperm(len(counted), generator=generator)[:most]]
            labels.append(label[chosen])
            for kind, x in tokens.items():
                rows[kind].append(x[of_image].flatten(0, 1)[chosen])
        num_images += len(masks)
    y = torch.cat(labels) if labels else torch.empty(0)
    if len(y.unique()) < 2:
        raise DataError(f"masks: the train part has {len(y.unique())} classes; segmentation needs at least 2")
    return {kind: torch.cat(x) for kind, x in rows.items()}, y, num_images


def _segment(
    part: Masked, encoder: _Encoder, bank: dict[str, Tensor], labels: Tensor, fitted: dict[str, Whitening]
) -> dict[tuple[str, str], Tensor]:
    """Return the counts [N, 3, C] of every image, by model and form. Raises DataError."""
    classes, y = labels.unique(return_inverse=True)
    banks = {(kind, ""): x for kind, x in bank.items()}
    banks |= {(kind, "_whitened"): append_whitened(x, fitted[kind]) for kind, x in bank.items()}
    counts: dict[tuple[str, str], list[Tensor]] = {key: [] for key in banks}
    for tokens, masks in encoder.batches(part, "eval: test"):
        for (kind, suffix), x in banks.items():
            q = append_whitened(tokens[kind], fitted[kind]) if suffix else tokens[kind]
            votes = knn_votes(x, y, q.flatten(0, 2), len(classes), encoder.config.k).unflatten(0, q.shape[:3])
            for vote, mask in zip(votes, masks, strict=True):  # one by one: C channels of all pixels
                found = classes[label_maps(vote[None], (mask.shape[0], mask.shape[1]))[0]]
                counts[kind, suffix].append(counts_of(found, mask, IGNORED))
    stacked = {key: torch.stack(of_images) for key, of_images in counts.items() if of_images}
    if not stacked or not next(iter(stacked.values()))[:, 1].any():
        raise DataError("masks: no pixel of the test part is labeled with a class that counts")
    return stacked


def _jackknife(counts: Tensor, measure: Callable[[Tensor], Tensor]) -> Jackknife:
    total = counts.sum(0)
    return Jackknife(float(measure(total)), measure(total - counts) if len(counts) > 1 else measure(counts))


def _by_class(counts: Tensor) -> dict[str, float]:
    return {str(c): 100 * float(x) for c, x in enumerate(iou_of(counts.sum(0))) if not x.isnan()}


def _parts(config: EvalConfig) -> tuple[Masked, Masked]:
    """Return the train and test images with their masks. Raises DataError."""
    paths, columns, reading = config.data.paths, columns_of(config.data), reading_of(config.data)
    masks = open_masks(str(config.masks))

    def paired(source: Source) -> Masked:
        return pair(source, paths, masks, str(config.masks))

    try:
        test = open_source(paths, "test", columns, reading)
        return paired(open_source(paths, "train", columns, reading)), paired(test)
    except NoTestPartError:
        if not config.test_fraction:
            raise
    source = open_source(paths, columns=columns, reading=reading)
    names = [source.name(i) for i in range(len(source))]
    by = HeldOut(config.test_fraction, config.runtime.seed)
    chosen = choose_test(names, [""] * len(names), by, source.groups()).numpy()
    if not chosen.any():
        raise DataError(f"data: {', '.join(paths)} has {len(names)} images; eval --masks needs at least 2")
    text = "data: no test part: %g %% of %d images held out, seed %d"
    log.info(text, 100 * by.fraction, len(names), by.seed)
    train, test = (subset(source, mask.nonzero()[0]) for mask in (~chosen, chosen))
    return paired(train), paired(test)
