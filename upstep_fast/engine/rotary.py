"""Rotary position embeddings (RoPE, Su et al. 2021): rotate pairs of q and k by the angles of the patch's position.

    (a, b)  ->  (a cos - b sin, b cos + a sin)              backward: the inverse rotation, with -sin

A pair are two adjacent values (EVA-02), or two values half a head apart (DINOv3). Class and register tokens are not
rotated. The table [N, 2 d] = [sin, cos] for the N patches of a grid is timm's, shared by all blocks and heads; each
value stands there twice, once for each value of its pair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upstep_fast.engine.packing import Sizes, unpack
from upstep_fast.engine.timm_blocks import grid_of

Ropes = (
    Sequence[Tensor] | None
)  # a table [N, 2 d] for every group of sequences; None: the model has no rotary positions


@dataclass(frozen=True)
class Rotary:
    """The rotation of q and k in a block's attention."""

    num_prefix: int  # tokens at the front that are not rotated
    is_half: bool  # pairs are half a head apart; else adjacent


def apply_rope(
    y: Tensor, heads: int, rotary: Rotary | None, ropes: Ropes, sizes: Sizes, inverse: bool = False
) -> Tensor:
    """Rotate q and k in packed qkv y [..., 3 D], in place. Returns y. inverse: by the opposite angles.

    Raises ValueError where the model has rotary positions and `ropes` is None.
    """
    if rotary is None:
        return y
    if ropes is None:
        raise ValueError("engine: this model has rotary positions, and no tables were given for these tokens")
    sign = -1 if inverse else 1
    for group, table in zip(unpack(y, sizes), ropes, strict=True):
        sin, cos = (_pairs(part, rotary)[0][:, None, None] for part in table.chunk(2, -1))
        q_k = group.unflatten(-1, (3, heads, -1))[:, rotary.num_prefix :, :2]
        a, b = _pairs(q_k.to(table.dtype), rotary)  # in fp32, and rounded once
        rotated = torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign)
        for view, values in zip(_pairs(q_k, rotary), rotated, strict=True):
            view.copy_(values)
    return y


def _pairs(x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Return the first and the second values of all pairs: [..., d] -> twice [..., d / 2], as views."""
    if rotary.is_half:
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., ::2], x[..., 1::2]


def without_rope(vit: Any) -> Any:
    """Return a shallow copy of `vit` without its table, which timm would compute for every batch on the CPU."""
    if getattr(vit, "rope", None) is None:
        return vit
    shallow = copy.copy(vit)
    shallow._modules = vit._modules | {"rope": None}
    return shallow


def make_ropes(vit: Any) -> Callable[[Tensor], Ropes]:
    """Return a function that gives the rotary tables for images or their patches, as `grid_of` takes them.

    The table is that of timm's `_pos_embed`, cached per grid; computed anew where training draws other coordinates.
    """
    rope = getattr(vit, "rope", None)
    cache: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def ropes(images: Tensor) -> Ropes:
        if rope is None:
            return None
        grid, is_drawn = grid_of(vit, images), rope.training and getattr(rope, "aug_active", False)
        table = None if is_drawn else cache.get(grid)
        if table is None:
            tokens = vit.patch_embed.proj.weight.new_zeros(1, *grid, vit.embed_dim)
            table = vit._pos_embed(tokens if vit.dynamic_img_size else tokens.flatten(1, 2))[1]
        if not is_drawn:
            cache[grid] = table
        return [table]

    return ropes
