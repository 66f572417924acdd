"""Features of images by the base model, the adapted model and both (ensemble), plain or whitened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped import SkippedImages
from upstep_fast.data.sources.source import Source
from upstep_fast.engine import vit as engine
from upstep_fast.errors import DataError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import backbone as backbones
from upstep_fast.model import lora, peft_format, pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute

log = logging.getLogger("upstep_fast")


@dataclass(frozen=True)
class Features:
    """Features of a labelled set of images."""

    x: Tensor  # [N, D] fp32, unit length
    y: Tensor  # [N] int64, index into `classes`
    classes: tuple[str, ...]


Form = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # what `extract` found -> [N, *] by base, adapted, ensemble


@dataclass(frozen=True)
class Extracted:
    """What `extract` found of a labelled set of images."""

    x: dict[str, Tensor]
    y: Tensor
    classes: tuple[str, ...]

    def features(self, form: Form) -> dict[str, Features]:
        """In one form, by "base", "adapted" and "ensemble"."""
        return {name: Features(x, self.y, self.classes) for name, x in form(self.x).items()}


def load_models(config: EvalConfig | EmbedConfig, *, backbone: Backbone | None = None) -> dict[str, Backbone]:
    """Return {"base": ..., "adapted": ...}, the second only with an adapter.

    backbone: the base model, if it is loaded already; it is copied and stays as it is. Raises ConfigError.
    """
    base = backbones.load_from(config.model) if backbone is None else backbone.copy()
    if config.adapter is None:
        return {"base": base}
    adapted = base.copy()
    peft_format.attach(adapted.vit, config.adapter)
    lora.merge(adapted.vit)
    return {"base": base, "adapted": adapted}


@torch.no_grad()
def extract(
    source: Source,
    models: dict[str, Backbone],
    config: EvalConfig | EmbedConfig,
    compute: Compute,
    patches: bool = True,
) -> tuple[dict[str, Tensor], list[int]]:
    """Run every model on every readable image. Returns {model: [N, P, D]} of unit length and the images' indices.

    patches: append the mean patch token (`pooling.pooled_and_patch_mean`); False: pooled features only, P = 1.
    """
    base = models["base"]
    pool = pooling.pooled_and_patch_mean if patches else pooling.pooled_only
    runs = {name: _feature_function(model, config, compute, pool) for name, model in models.items()}
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    read: list[int] = []
    skipped = SkippedImages()
    batches = load_images(
        source,
        distributed.own_part(len(source)),
        **base.eval_transform_args,
        batch_size=config.batch_size,
        num_workers=config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
        skipped=skipped,
    )
    for indices, images in batches:
        x = base.normalized(images.to(compute.device))
        read += indices.tolist()
        for name, run in runs.items():
            with compute.autocast():
                f = run(x)
            rows[name].append(F.normalize(f.float(), dim=-1).cpu())
    for name, reason in skipped.items():
        log.warning("skipped %s: %s", name, reason)
    read = [index for part in distributed.gather(read) for index in part]
    if not read:
        raise DataError(
            f"data: none of the {len(source)} images could be read; the first: {next(iter(skipped.items()))}"
        )
    # a rank without images has none to tell the shape of
    num = {name: pooling.num_parts(model.vit) if patches else 1 for name, model in models.items()}
    nothing = {name: torch.empty(0, num[name], model.width) for name, model in models.items()}
    own = {name: torch.cat(parts) if parts else nothing[name] for name, parts in rows.items()}
    return {name: torch.cat(distributed.gather_parts(x)) for name, x in own.items()}, read


def _feature_function(
    model: Backbone, config: EvalConfig | EmbedConfig, compute: Compute, pool: Callable[[Any, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    vit = model.vit.to(compute.device).requires_grad_(False)

    def by_the_model(images: Tensor) -> Tensor:
        return pool(vit, vit.forward_features(images))

    if config.runtime.implementation == "reference":
        return by_the_model
    dtype = compute.dtype or torch.float32
    return engine.choose(vit, dtype, "fast", otherwise=by_the_model, fp8=compute.fp8, pool=pool)


def unwhitened(x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what `extract` found the features as they are, [N, D], and their ensemble [N, 2 D]."""
    return _with_ensemble({name: parts[:, 0].contiguous() for name, parts in x.items()})


def append_whitened(x: Mapping[str, Tensor], fitted: Mapping[str, Whitening]) -> dict[str, Tensor]:
    """Of what `extract` found the features with whitened ones beside them, and their ensemble."""
    return _with_ensemble({name: whitening.append_whitened(x[name], by) for name, by in fitted.items()})


def _with_ensemble(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return found | ({"ensemble": ensemble(found["base"], found["adapted"])} if "adapted" in found else {})


def ensemble(base: Tensor, adapted: Tensor) -> Tensor:
    """Unit features side by side, of unit length again: their cosine is the mean of the two. [N, D] -> [N, 2 D]."""
    return torch.cat([base, adapted], -1) / 2**0.5
