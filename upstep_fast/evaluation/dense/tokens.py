"""Patch tokens of a ViT on their grid: unit vectors, plain or with whitened ones appended.

    t = token / |token|                 token: after the model's last norm, as vit.forward_features gives it
    w(t) = S^(-1/2) (t - m), unit       m, S: mean and shrunk covariance of single tokens (whitening.py)
    phi = [t, w(t)] / sqrt(2)           [2 D], unit length

The whitening of a run is fitted to mean patch tokens, which vary less than single ones and in other directions:
appended to single tokens it gained 0.1 to 0.3 points of mean IoU in k-NN segmentation, one fitted to single tokens 1
point (bench/results/dense_cpu.json). So tokens are plain unless a whitening of single tokens is fitted or given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.data.loading.loader import load_images
from upstep_fast.data.loading.skipped_images import SkippedImages
from upstep_fast.data.sources.source import Source
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.features import check_finite, feature_function
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model import pooling
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.progress import track

BATCH_BYTES = 128 << 20  # limit on the tokens of one batch, fp32


def grid_of(model: Backbone) -> tuple[int, int]:
    """Return the number of patches (down, across) of the model's input."""
    height, width = model.vit.patch_embed.dynamic_feat_size(model.img_size)
    return height, width


def on_grid(tokens: Tensor, model: Backbone) -> Tensor:
    """Return patch tokens [B, H W, D] as [B, H, W, D]. Raises ConfigError if they are not one for each patch."""
    height, width = grid_of(model)
    if tokens.shape[1] != height * width:
        raise ConfigError(
            f"tokens: {model.name} gives {tokens.shape[1]} tokens beside its prefix tokens, which are no grid of "
            f"{height} x {width} patches; take a model that keeps every patch"
        )
    return tokens.unflatten(1, (height, width))


def append_whitened(tokens: Tensor, fitted: Whitening) -> Tensor:
    """Return phi: unit tokens [..., D] -> [..., 2 D]. fitted: to single tokens, P = 1."""
    return whitening.append_whitened(tokens.reshape(-1, 1, tokens.shape[-1]), fitted).unflatten(0, tokens.shape[:-1])


@torch.no_grad()
def token_batches(
    source: Source,
    part: Sequence[int],
    model: Backbone,
    config: EmbedConfig,
    compute: Compute,
    skipped: SkippedImages,
    name: str = "embed",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the readable images' indices [B] int64 and tokens [B, H, W, D], unit vectors in fp32 on the CPU.

    part: indices of the images; name: of the progress line. Raises DataError, RunFailedError and ConfigError.
    """
    kind = "base" if config.adapter is None else "adapted"
    run = feature_function(model, config.runtime.implementation, compute, pooling.patch_tokens)
    height, width = grid_of(model)
    most = max(1, BATCH_BYTES // (4 * height * width * model.width))
    batches = load_images(
        source,
        part,
        **model.eval_transform_args,
        batch_size=min(config.batch_size, most),
        num_workers=config.data.num_workers,
        max_bad_fraction=config.data.max_bad_fraction,
        skipped=skipped,
    )
    with track(name, len(part), device=compute.device.type) as task:
        for indices, images in batches:
            with compute.autocast():
                tokens = run(model.normalized(images, compute.device))
            tokens = F.normalize(tokens.float(), dim=-1).cpu()
            check_finite(tokens, kind, source, indices, compute)
            distributed.require_ranks()
            task.advance(len(indices))
            yield indices, on_grid(tokens, model)
