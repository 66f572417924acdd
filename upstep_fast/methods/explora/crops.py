"""The crops that DINOv2's objective sees of a batch: global and local ones, and which patches are masked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.explora import Dinov2Config
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.data.views.views import multi_crop
from upstep_fast.methods.crops import GLOBAL_VIEWS
from upstep_fast.methods.explora.tokens import block_mask

_MASKS = 7  # names the random numbers of masks among those of (seed, epoch, index)


@dataclass(frozen=True)
class Crops:
    """The views of a batch of B images."""

    whole: Tensor  # [2, B, C, H, W], the global crops
    local: Tensor  # [n, B, C, h, w], n may be 0
    masked: Tensor  # [2, B, N] bool, patches of the global crops that the student does not see
    places: Tensor  # [M], where these are among all 2 B N: known to the host, so that no step waits for the device
    weights: Tensor  # [M] fp32, 1 / (masked patches of the crop)

    def __len__(self) -> int:
        return len(self.whole)


# counted and moved tensor by tensor
torch.export.register_dataclass(Crops)


def draw(
    batch: Batch, how: list[tuple[ViewConfig, int]], grid: tuple[int, int], config: Dinov2Config, device: torch.device
) -> Crops:
    """The crops of a batch, made as `recipes` says, and the masks of the global ones, which have `grid` patches."""
    key = {"seed": config.runtime.seed, "epoch": batch.epoch, "indices": batch.indices, "device": device}
    crops = multi_crop(batch.images, how, **key)  # type: ignore[arg-type]
    indices = batch.indices.tolist()
    masks = [[mask(config, grid, batch.epoch, index, view) for index in indices] for view in range(GLOBAL_VIEWS)]
    masked = np.array(masks).reshape(GLOBAL_VIEWS, len(batch.images), -1)
    return Crops(crops[0], crops[1] if len(crops) > 1 else crops[0][:0], *_places(masked, device))


def mask(config: Dinov2Config, grid: tuple[int, int], epoch: int, index: int, view: int) -> np.ndarray:
    """Which patches of a global crop are masked: [down, across] bool."""
    random = np.random.default_rng((config.runtime.seed, epoch, index, view, _MASKS))
    if not config.dinov2.ibot_weight or random.random() >= config.dinov2.mask_probability:
        return np.zeros(grid, bool)
    share = random.uniform(*config.dinov2.mask_ratio)
    return block_mask(grid, int(share * grid[0] * grid[1]), random)


def _places(masked: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`Crops.masked`, `places` and `weights` of masks [2, B, N]."""
    weights = np.broadcast_to(1 / masked.sum(-1, keepdims=True).clip(1), masked.shape)[masked]
    found = torch.from_numpy(masked), torch.from_numpy(np.flatnonzero(masked)), torch.from_numpy(weights).float()
    return tuple(x.to(device, non_blocking=True) for x in found)  # type: ignore[return-value]
