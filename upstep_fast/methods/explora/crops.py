"""Crops for DINOv2's objective: global and local ones, and the masked patches of the global ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.explora import Dinov2Config
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.make_views import multi_crop
from upstep_fast.data.views.types import Views, register_views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.methods.crops import GLOBAL_VIEWS
from upstep_fast.methods.explora.tokens import block_mask

_MASKS = 7  # names the random numbers of masks among those of (seed, epoch, index)


@dataclass(frozen=True, kw_only=True)
class MaskedCrops(Views):
    """Two global crops of each of B images, with masked patches, and n local crops; n may be 0."""

    local: Tensor  # [n, B, C, h, w]
    masked: Tensor  # [2, B, N] bool, patches of the global crops that the student does not see
    indices: Tensor  # [M], of these among all 2 B N: known to the host, so that no step waits for the device
    weights: Tensor  # [M] fp32, 1 / (masked patches of the crop)


register_views(MaskedCrops)


def draw(
    batch: Batch,
    view_configs: list[tuple[ViewConfig, int]],
    grid: tuple[int, int],
    config: Dinov2Config,
    device: torch.device,
) -> MaskedCrops:
    """Make the crops of a batch, and the masks of the global ones. grid: patches of a global crop, down and across."""
    key = {"seed": config.runtime.seed, "epoch": batch.epoch, "indices": batch.indices, "device": device}
    crops = multi_crop(batch.images, view_configs, **key)  # type: ignore[arg-type]
    local = crops[1] if len(crops) > 1 else crops[0][:0]
    image_indices = batch.indices.tolist()
    masks = [[mask(config, grid, batch.epoch, index, view) for index in image_indices] for view in range(GLOBAL_VIEWS)]
    masked = np.array(masks).reshape(GLOBAL_VIEWS, len(batch.images), -1)
    weights = np.broadcast_to(1 / masked.sum(-1, keepdims=True).clip(1), masked.shape)[masked]
    return MaskedCrops.of(
        crops[0],
        local,
        masked=torch.from_numpy(masked).to(device, non_blocking=device.type == "cuda"),
        indices=torch.from_numpy(np.flatnonzero(masked)).to(device, non_blocking=device.type == "cuda"),
        weights=torch.from_numpy(weights).float().to(device, non_blocking=device.type == "cuda"),
    )


def mask(config: Dinov2Config, grid: tuple[int, int], epoch: int, index: int, view: int) -> np.ndarray:
    """Draw the masked patches of a global crop: [down, across] bool. index: of the image."""
    random = np.random.default_rng((config.runtime.seed, epoch, index, view, _MASKS))
    if not config.dinov2.ibot_weight or random.random() >= config.dinov2.mask_probability:
        return np.zeros(grid, bool)
    share = random.uniform(*config.dinov2.mask_ratio)
    return block_mask(grid, int(share * grid[0] * grid[1]), random)
