"""Rotary positions (RoPE, Su et al. 2021): q and k of a patch are turned, pair by pair, by the angles of its place.

    (a, b)  ->  (a cos - b sin, b cos + a sin)              backward: by the opposite angles, sin with its sign changed

A pair are two values side by side (EVA-02), or half a head apart (DINOv3). Class and register tokens are not turned.
The angles' sines and cosines are timm's: one table [N, 2 d] = [sin, cos] for the N patches of a grid, the same in every
block and head, each value standing twice, as its pair does.
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

Ropes = Sequence[Tensor] | None  # a table for every group of sequences; None: the model has no rotary positions


@dataclass(frozen=True)
class Rotary:
    """How a block's attention turns q and k."""

    prefix: int  # so many tokens at the front stay as they are
    half: bool  # pairs stand half a head apart; else side by side


def apply_rope(y: Tensor, heads: int, rotary: Rotary | None, ropes: Ropes, sizes: Sizes, back: bool = False) -> Tensor:
    """Turn q and k in y, packed qkv [..., 3 D], in place; gives y. back: by the opposite angles."""
    if rotary is None:
        return y
    if ropes is None:
        raise ValueError("engine: this model has rotary positions, and none were given for these tokens")
    sign = -1 if back else 1
    for group, table in zip(unpack(y, sizes), ropes, strict=True):
        sin, cos = (_of_pairs(part, rotary)[0][:, None, None] for part in table.chunk(2, -1))
        q_k = group.unflatten(-1, (3, heads, -1))[:, rotary.prefix :, :2]
        a, b = _of_pairs(q_k.to(table.dtype), rotary)  # in fp32, and rounded once
        turned = torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign)
        for place, values in zip(_of_pairs(q_k, rotary), turned, strict=True):
            place.copy_(values)
    return y


def _of_pairs(x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """The first and the second values of all pairs: [..., d] -> twice [..., d / 2], as views."""
    if rotary.half:
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., ::2], x[..., 1::2]


def without_rope(vit: Any) -> Any:
    """A twin that shares all with `vit` but makes no table; timm makes one for every batch, on the CPU."""
    if getattr(vit, "rope", None) is None:
        return vit
    twin = copy.copy(vit)
    twin._modules = vit._modules | {"rope": None}
    return twin


def make_ropes(vit: Any) -> Callable[[Tensor], Ropes]:
    """A function that gives the table for images, or for their patches, as `grid_of` takes them.

    It is what timm's `_pos_embed` gives, kept for every grid; made anew where training draws other coordinates.
    """
    rope = getattr(vit, "rope", None)
    kept: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def ropes(images: Tensor) -> Ropes:
        if rope is None:
            return None
        grid, drawn = grid_of(vit, images), rope.training and getattr(rope, "aug_active", False)
        table = None if drawn else kept.get(grid)
        if table is None:
            tokens = vit.patch_embed.proj.weight.new_zeros(1, *grid, vit.embed_dim)
            table = vit._pos_embed(tokens if vit.dynamic_img_size else tokens.flatten(1, 2))[1]
        if not drawn:
            kept[grid] = table
        return [table]

    return ropes
