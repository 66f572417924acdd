"""Features of images by the base model, the adapted model and both (ensemble), unwhitened or whitened."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.config.flat import flat
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.sources.source import Source
from upstep_fast.engine import vit as engine
from upstep_fast.errors import DataError, RunFailedError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.identity import model_identity
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.duration import log_estimate
from upstep_fast.runtime.progress import Task, track
from upstep_fast.version import __version__

log = logging.getLogger("upstep_fast")

FEW = 32  # images of a batch of `plain_features`


@dataclass(frozen=True)
class Features:
    """Features of a labeled set of images."""

    x: Tensor  # [N, D] fp32, unit length
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]


# {model: [N, P, D]} of `extract` -> {"base", "adapted", "ensemble": [N, ...]}
Form = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Extracted:
    """The result of `extract` on a labeled set of images."""

    x: dict[str, Tensor]  # by model, [N, P, D]
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]

    def features(self, form: Form) -> dict[str, Features]:
        """Return the features in one form, by "base", "adapted" and "ensemble"."""
        return {name: Features(x, self.y, self.classes) for name, x in form(self.x).items()}


def load_models(config: EvalConfig | EmbedConfig, *, backbone: Backbone | None = None) -> dict[str, Backbone]:
    """Return {"base": ..., "adapted": ...}, the second only with an adapter.

    backbone: the base model, if it is loaded already; it is copied and stays as it is. Raises ConfigError.
    """
    base = backbones.load_from(config.model) if backbone is None else backbone.copy()
    if config.adapter is None:
        return {"base": base}
    adapted = base.copy()
    peft_format.attach(adapted.vit, config.adapter, model=config.model.name, any_base=config.any_base)
    lora.merge(adapted.vit)
    return {"base": base, "adapted": adapted}


@dataclass(frozen=True)
class Extractor:
    """The models with their engines, built once, that `extract` and the writer of a folder run on parts of a source."""

    source: Source
    models: dict[str, Backbone]
    functions: dict[str, Callable[[Tensor], Tensor]]
    config: EvalConfig | EmbedConfig
    compute: Compute

    @torch.no_grad()
    def run(
        self, indices: Sequence[int], skipped: SkippedImages, task: Task, max_bad_fraction: float
    ) -> tuple[list[int], dict[str, list[Tensor]]]:
        """Return the indices read, and {model: batches of unit features [B, P, D] on the CPU}, of images at `indices`.

        skipped: collects the images that cannot be read. Raises as `extract` does.
        """
        base, rows = self.models["base"], dict[str, list[Tensor]]((kind, []) for kind in self.functions)
        read: list[int] = []
        for batch_indices, images in _batches(self.source, indices, base, self.config, skipped, max_bad_fraction):
            x = base.normalized(images, self.compute.device)
            read += batch_indices.tolist()
            for kind, run in self.functions.items():
                with self.compute.autocast():
                    rows[kind].append(F.normalize(run(x).float(), dim=-1).cpu())
                check_finite(rows[kind][-1], kind, self.source, batch_indices, self.compute)
            distributed.require_ranks()
            task.advance(len(batch_indices))
        return read, rows


def make_extractor(
    source: Source,
    models: dict[str, Backbone],
    config: EvalConfig | EmbedConfig,
    compute: Compute,
    patches: bool,
    kinds: Sequence[str] | None = None,
) -> Extractor:
    """Return the extractor, after all ranks have agreed on what they run. patches, kinds: as for `extract`."""
    agree(source, models["base"], config)
    pool = pooling.pooled_and_patch_mean if patches else pooling.pooled_only
    how = config.runtime.implementation, compute, pool
    with torch.no_grad():
        functions = {kind: feature_function(models[kind], *how) for kind in kinds or models}
    return Extractor(source, models, functions, config, compute)


def extract(
    source: Source,
    models: dict[str, Backbone],
    config: EvalConfig | EmbedConfig,
    compute: Compute,
    patches: bool = True,
    name: str = "features",
    kinds: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Run the models on every readable image. Return {model: unit features [N, P, D]} and the indices read, [N].

    patches: append the mean patch token (`pooling.pooled_and_patch_mean`); False: pooled features only, P = 1. Under
    torchrun each rank reads a part of the images, and all ranks return all features. name: of the progress line. kinds:
    names of the models that are run; None: all. Raises DataError, and RunFailedError for features that are not finite.
    """
    extractor = make_extractor(source, models, config, compute, patches, kinds)
    skipped = SkippedImages()
    part = distributed.own_part(len(source))
    log_work(name, len(source), models, kinds)
    with track(name, len(part), device=compute.device.type) as task:
        local_indices, rows = extractor.run(part, skipped, task, config.data.max_bad_fraction)
    distributed.wait_for_ranks()
    indices = _gather_indices(local_indices, skipped, len(source))
    return {kind: _gather_features(x, models[kind], patches) for kind, x in rows.items()}, indices


def log_work(name: str, num_images: int, models: Mapping[str, Backbone], kinds: Sequence[str] | None = None) -> None:
    """Log how many images the models are to run on, and the size of both. kinds: as for `extract`."""
    base, height, width = models["base"], *models["base"].img_size
    millions = sum(p.numel() for p in base.vit.parameters()) / 1e6
    which = ", with and without the adapter" if len(kinds or models) > 1 else ""
    log.info("%s: %s images at %d x %d px, model of %.1f M%s", name, f"{num_images:,}", height, width, millions, which)


def log_time(num_images: int, models: Mapping[str, Backbone], compute: Compute) -> None:
    """Log the rough time of `extract` for so many images in all, on a CPU."""
    flops = num_images / distributed.size() * sum(model.forward_flops for model in models.values())
    log_estimate(flops, compute, lambda seconds: "fewer images in --data, a smaller --model or --img-size")


def _batches(
    source: Source,
    part: Sequence[int],
    base: Backbone,
    config: EvalConfig | EmbedConfig,
    skipped: SkippedImages,
    max_bad_fraction: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    return load_images(
        source,
        part,
        **base.eval_transform_args,
        batch_size=config.batch_size,
        num_workers=config.data.num_workers,
        max_bad_fraction=max_bad_fraction,
        skipped=skipped,
    )


def agree(source: Source, base: Backbone, config: EvalConfig | EmbedConfig) -> None:
    """Raise ConfigError naming the first of configuration, versions, model and data in which a rank differs."""
    if distributed.size() == 1:
        return
    distributed.wait_for_ranks()
    labels = source.labels
    # model and data are compared by content: their places may differ between machines
    facts = {
        "config": {k: v for k, v in flat(config).items() if k not in ("device", "num_workers", "model", "data")},
        "versions": {"upstep_fast": __version__, "torch": torch.__version__},
        "model": model_identity(base),
        "adapter": None if config.adapter is None else peft_format.fingerprint(config.adapter),
        "data": {"images": len(source), "sha256": source.fingerprint()},
        "labels": None if labels is None else hashlib.sha256(json.dumps(labels).encode()).hexdigest(),
    }
    distributed.agree_on(json.loads(json.dumps(facts)))


def check_finite(f: Tensor, name: str, source: Source, indices: Tensor, compute: Compute) -> None:
    """Raise RunFailedError naming an image whose features, unit vectors f [B, P, D], are not finite or are all 0."""
    bad = ((f.norm(dim=-1) - 1).abs() < 0.5).all(-1).logical_not()  # also of NaN
    if bad.any():
        cure = "use --precision fp32" if compute.dtype not in (None, torch.float32) else "check its weights"
        raise RunFailedError(
            f"model: the {name} model's features of {source.name(int(indices[bad][0]))} are not finite or all zero "
            f"({int(bad.sum())} of {len(bad)} images of the batch); {cure}{' or the adapter' if name != 'base' else ''}"
        )


def _gather_indices(local: list[int], skipped: SkippedImages, count: int) -> list[int]:
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    indices = [index for part in distributed.gather(local) for index in part]
    if not indices:
        raise DataError(f"data: none of the {count} images could be read; the first: {next(iter(skipped.items()))}")
    return indices


def _gather_features(rows: list[Tensor], model: Backbone, patches: bool) -> Tensor:
    # a rank that read no image still needs the shape
    num = pooling.num_parts(model.vit) if patches else 1
    return torch.cat(distributed.gather_parts(torch.cat(rows) if rows else torch.empty(0, num, model.width)))


def feature_function(
    model: Backbone, implementation: str, compute: Compute, pool: Callable[[Any, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return a function from normalized images [B, C, H, W] to features [B, P, D], by the engine where it runs.

    The model's ViT is moved to the device, in place, and must not change afterwards. pool: `pooling.pooled_only` or
    `pooling.pooled_and_patch_mean`. Call it without gradients, under `compute.autocast()`.
    """
    vit = model.vit.to(compute.device).requires_grad_(False)

    def reference(images: Tensor) -> Tensor:
        return pool(vit, vit.forward_features(images))

    if implementation == "reference":
        return reference
    dtype = compute.dtype or torch.float32
    return engine.make_features(vit, dtype, "fast", fallback=reference, fp8=compute.fp8, pool=pool, frozen=True)[0]


@torch.no_grad()
def plain_features(
    source: Source,
    base: Backbone,
    vits: Sequence[nn.Module],
    compute: Compute,
    num_workers: int | None,
    pool: Callable[[Any, Tensor], Tensor],
    task: Task,
) -> tuple[list[int], list[Tensor]]:
    """Return the indices of the readable images, and each model's unit features of them, fp32 [N, D] or [N, P, D].

    For few images on one rank: without the engine, which compiles first. base: names the transform; vits: on the
    device. pool: a model and normalized images -> [B, D] or [B, P, D]. Raises DataError if none can be read.
    """
    read: list[int] = []
    rows: list[list[Tensor]] = [[] for _ in vits]
    arguments = base.eval_transform_args | {"batch_size": FEW, "num_workers": num_workers}
    for batch, images in load_images(source, **arguments, max_bad_fraction=1.0):
        x = base.normalized(images, compute.device)
        read += batch.tolist()
        for features, vit in zip(rows, vits, strict=True):
            with compute.autocast():
                features.append(F.normalize(pool(vit, x).float(), dim=-1).cpu())
        task.advance(len(batch))
    if not read:
        raise DataError("data: none of the images could be read")
    return read, [torch.cat(features) for features in rows]


def unwhitened(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the unwhitened features [N, D] per model, and the ensemble [N, 2 D]. x: of `extract`."""
    return _with_ensemble({name: parts[:, 0].contiguous() for name, parts in x.items()})


def append_whitened(x: Mapping[str, Tensor], fitted: Mapping[str, Whitening]) -> dict[str, Tensor]:
    """Return the features with whitened ones appended, [N, (1 + P) D] per model, and the ensemble. x: of `extract`."""
    return _with_ensemble({name: whitening.append_whitened(x[name], by) for name, by in fitted.items()})


def _with_ensemble(features: dict[str, Tensor]) -> dict[str, Tensor]:
    if not {"base", "adapted"} <= features.keys():
        return features
    return features | {"ensemble": ensemble(features["base"], features["adapted"])}


def ensemble(base: Tensor, adapted: Tensor) -> Tensor:
    """Concatenate unit features to unit length, [N, D] -> [N, 2 D]: the cosine of two ensembles is the mean of both."""
    return torch.cat([base, adapted], -1) / 2**0.5
