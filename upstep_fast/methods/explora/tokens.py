"""ExPLoRA's forward pass over tokens: crops of any size, masked patches, or some patches alone.

x = patches (masked ones replaced by the mask token) + positions; class and register tokens before them
norm(blocks(x))                                                                     on the engine where it can
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from upstep_fast.engine.block import Memory
from upstep_fast.engine.vit import EngineViT, try_build
from upstep_fast.model.pooling import pooled


def positions(vit: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the position embeddings of the prefix tokens [1, P or 0, D] and of a grid of patches [1, N, D].

    Another grid than the model's own gets them interpolated as timm does, bicubic with antialiasing: so they are where
    the adapted model is used. DINOv2's code, without registers, takes no antialiasing and an offset of 0.1.
    """
    if vit.pos_embed is None:
        nothing = vit.patch_embed.proj.weight.new_zeros(1, 1, vit.embed_dim)
        return nothing[:, :0], nothing
    num_prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    table = vit.pos_embed
    if grid != tuple(vit.patch_embed.grid_size):
        table = resample_abs_pos_embed(table, grid, tuple(vit.patch_embed.grid_size), num_prefix)
    return table[:, :num_prefix], table[:, num_prefix:]


def embed(
    vit: Any,
    images: Tensor,
    *,
    masked: Tensor | None = None,
    mask_token: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Embed images [B, C, H, W], of any size, as the first block's input: [B, P + N, D], P prefix tokens.

    masked: [B, N] bool, patches that `mask_token` [D] replaces. visible: [B, n], indices of the only patches taken.
    """
    patches = vit.patch_embed.proj(images)  # [B, D, down, across]
    x = vit.patch_embed.norm(patches.flatten(2).transpose(1, 2))
    if masked is not None and mask_token is not None:
        x = torch.where(masked[..., None], mask_token.to(x.dtype), x)
    prefix_positions, patch_positions = positions(vit, tuple(patches.shape[-2:]))
    x = x + patch_positions
    if visible is not None:
        x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[-1]))
    prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    if prefix:
        joined = torch.cat(prefix, 1)
        x = torch.cat([(joined + prefix_positions if prefix_positions.shape[1] else joined).to(x.dtype), x], 1)
    return vit.norm_pre(x)


class Encoder:
    """The blocks and the final norm of a ViT, on the engine once `accelerate` was called and where it can."""

    def __init__(self, vit: Any):
        self.vit = vit
        self._engine: EngineViT | None = None

    def accelerate(self, dtype: torch.dtype, memory: Memory, fp8: bool = False) -> str | None:
        """Fold the frozen blocks for the engine. Returns the reason if the engine cannot run them, else None."""
        built = try_build(self.vit, dtype, memory, fp8=fp8)
        if isinstance(built, str):
            return built
        self._engine = built
        return None

    def __call__(self, *groups: Tensor) -> list[Tensor]:
        """Run tokens [B, N, D] of each group through the blocks and the final norm; shapes stay.

        Groups may differ in B and N: the engine takes all in one pass (engine/packing.py), the plain model one by one.
        """
        if self._engine is None:
            return [self.vit.norm(self.vit.blocks(group)) for group in groups]
        with torch.autocast(groups[0].device.type, enabled=False):
            return [self.vit.norm(group.float()) for group in self._engine.through_blocks(groups)]

    def at(self, groups: Sequence[Tensor], indices: Tensor) -> Tensor:
        """Return the output tokens at `indices`, [M], among those of all groups in order: [M, D]."""
        if self._engine is None:
            return torch.cat([group.flatten(0, 1) for group in self(*groups)])[indices]
        with torch.autocast(indices.device.type, enabled=False):
            return self.vit.norm(self._engine.rows_through_blocks(groups, indices).float())


def encode(vit: Any, encoder: Encoder, groups: Sequence[Tensor], patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [S, D] of the S sequences of all groups, and tokens [M, D] of some patches of the first group.

    groups: [B, P + N, D] each, as `embed` gives them; patches: [M] indices among the B N patches of the first group.
    Where the features are class tokens, the engine computes no other tokens of the last block.
    """
    prefix = vit.num_prefix_tokens
    if vit.global_pool != "token" or vit.attn_pool is not None:
        tokens = encoder(*groups)
        return torch.cat([pooled(vit, group) for group in tokens]), tokens[0][:, prefix:].flatten(0, 1)[patches]
    start, class_tokens = 0, []
    for group in groups:
        class_tokens.append(start + group.shape[1] * torch.arange(len(group), device=group.device))
        start += len(group) * group.shape[1]
    image = patches // (groups[0].shape[1] - prefix)
    rows = encoder.at(groups, torch.cat([*class_tokens, patches + prefix * (image + 1)]))
    num_sequences = len(rows) - len(patches)
    return pooled(vit, rows[:num_sequences, None]), rows[num_sequences:]


MIN_BLOCK, MIN_ASPECT, TRIES = 4, 0.3, 10  # patches; height over width; as DINOv2's masking generator


def block_mask(grid: tuple[int, int], count: int, random: np.random.Generator) -> np.ndarray:
    """Draw a mask of at most `count` patches made of rectangles: [down, across] bool (BEiT, Bao et al. 2022)."""
    mask = np.zeros(grid, bool)
    left = count
    while left > 0 and (taken := _add_rectangle(mask, left, random)):
        left -= taken
    return mask


def _add_rectangle(mask: np.ndarray, at_most: int, random: np.random.Generator) -> int:
    """Add a random rectangle to `mask`, in place. Returns the number of patches added; 0 if none fits."""
    down, across = mask.shape
    for _ in range(TRIES):
        area = random.uniform(min(MIN_BLOCK, at_most), at_most)
        aspect = math.exp(random.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        h, w = max(1, round(math.sqrt(area * aspect))), max(1, round(math.sqrt(area / aspect)))
        if h >= down or w >= across:
            continue
        top, left = int(random.integers(down - h + 1)), int(random.integers(across - w + 1))
        rectangle = mask[top : top + h, left : left + w]
        added = rectangle.size - int(rectangle.sum())
        if 0 < added <= at_most:
            rectangle[:] = True
            return added
    return 0
