"""Blocks that are not folded, such as fully trained ones, on the rows of several groups (packing.py).

    o = attention(qkv(norm1(x)))        all tokens, attention per group
    x = x + ls1(proj(o))                from here on only the tokens `indices`
    x = x + ls2(mlp(norm2(x)))

If only the class tokens and a few patches of the last block are used, proj and the MLP run on those tokens only: the
result is equal, for a quarter of the work on the other tokens.
"""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from timm.layers.drop import DropPath
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from upstep_fast.engine.packing import Sizes, drop_path_scale, pack, scale_branch, unpack
from upstep_fast.engine.rotary import Ropes
from upstep_fast.engine.timm_blocks import altered_reason
from upstep_fast.kernels.attention import attention


def run_plain_block(
    block: nn.Module, x: Tensor, sizes: Sizes, indices: Tensor | None = None, ropes: Ropes = None
) -> Tensor:
    """Run a block by its own modules on x as `pack` lays it out. Returns all tokens, or the rows [M, D] of `indices`.

    indices: [M] int64, among all tokens in the order of the rows. ropes: the rotary table of each group.
    """
    if not _is_standard(block):
        groups = unpack(x, sizes)
        arguments = [{}] * len(groups) if ropes is None else [{"rope": table} for table in ropes]
        x = pack([block(group, **kwargs) for group, kwargs in zip(groups, arguments, strict=True)])
        return x if indices is None else select_tokens(x, indices)
    timm_block: Any = block
    attn, drop_paths = timm_block.attn, (timm_block.drop_path1, timm_block.drop_path2)
    drop_scales = [drop_path_scale(drop_path, x, sizes) for drop_path in drop_paths]
    parts = unpack(attn.qkv(timm_block.norm1(x)), sizes)
    o = pack([attention(part.unflatten(-1, (3, attn.num_heads, -1))).flatten(2) for part in parts])
    if indices is not None:
        drop_scales = [None if s is None else select_tokens(s.expand(*x.shape[:-1], 1), indices) for s in drop_scales]
        x, o = select_tokens(x, indices), select_tokens(o, indices)
    x = x + scale_branch(timm_block.ls1(attn.proj_drop(attn.proj(attn.norm(o)))), drop_scales[0])
    return x + scale_branch(timm_block.ls2(timm_block.mlp(timm_block.norm2(x))), drop_scales[1])


def select_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Return the tokens `indices` [M] of x [T, D] or [B, N, D], as [M, D]."""
    return x.flatten(0, -2).index_select(0, indices)


def _is_standard(block: Any) -> bool:
    """Return whether the block is timm's pre-norm Block with plain softmax attention, as timm wrote it."""
    if type(block) is not Block or type(block.attn) is not Attention or altered_reason(block) is not None:
        return False
    attn, gate = block.attn, getattr(block.attn, "gate", None)
    is_plain = gate is None and all(type(norm) is nn.Identity for norm in (attn.q_norm, attn.k_norm))
    known_drops = all(isinstance(drop, DropPath | nn.Identity) for drop in (block.drop_path1, block.drop_path2))
    has_usual_scale = attn.scale == attn.head_dim**-0.5
    return is_plain and known_drops and has_usual_scale and not (block.training and attn.attn_drop.p)
