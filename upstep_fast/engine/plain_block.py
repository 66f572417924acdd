"""Blocks that are not folded, as those that are trained whole, on rows of several groups (packed.py).

    o = attention(qkv(norm1(x)))        all tokens, attention group by group
    x = x + ls1(proj(o))                from here on the wanted tokens alone
    x = x + ls2(mlp(norm2(x)))

What follows attention sees one token at a time. So of a last block whose class tokens and a few patches are all that is
looked at, three quarters of the products need not be computed for the other tokens; the result is the same.
"""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from upstep_fast.engine.packing import Sizes, draw_path, pack, unpack
from upstep_fast.engine.rotary import Ropes
from upstep_fast.kernels.attention import attention


def run_plain(block: nn.Module, x: Tensor, sizes: Sizes, wanted: Tensor | None = None, ropes: Ropes = None) -> Tensor:
    """A block by its own modules: x, as `pack` gives it -> the same after the block, or the rows [M, D] of `wanted`.

    wanted: [M] places among all tokens, in the order of the rows; None: all. ropes: the rotary table of each group.
    """
    if not _is_ordinary(block):
        groups = unpack(x, sizes)
        more = [{}] * len(groups) if ropes is None else [{"rope": table} for table in ropes]
        x = pack([block(group, **own) for group, own in zip(groups, more, strict=True)])
        return x if wanted is None else take(x, wanted)
    any_block: Any = block
    attn, keep = any_block.attn, [draw_path(path, x, sizes) for path in (any_block.drop_path1, any_block.drop_path2)]
    parts = unpack(attn.qkv(any_block.norm1(x)), sizes)
    o = pack([attention(part.unflatten(-1, (3, attn.num_heads, -1))).flatten(2) for part in parts])
    if wanted is not None:
        keep = [None if k is None else take(k.expand(*x.shape[:-1], 1), wanted) for k in keep]
        x, o = take(x, wanted), take(o, wanted)
    x = x + _scaled(any_block.ls1(attn.proj_drop(attn.proj(attn.norm(o)))), keep[0])
    return x + _scaled(any_block.ls2(any_block.mlp(any_block.norm2(x))), keep[1])


def take(x: Tensor, wanted: Tensor) -> Tensor:
    """The tokens `wanted`, [M] places, of x [T, D] or [B, N, D]: [M, D]."""
    return x.flatten(0, -2).index_select(0, wanted)


def _is_ordinary(block: Any) -> bool:
    """Whether it is timm's pre-norm block with plain softmax attention, which ours may stand in for."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attn = block.attn
    is_bare = all(isinstance(norm, nn.Identity) for norm in (attn.q_norm, attn.k_norm))
    return is_bare and getattr(attn, "gate", None) is None and not (block.training and attn.attn_drop.p)


def _scaled(branch: Tensor, keep: Tensor | None) -> Tensor:
    return branch if keep is None else branch * keep
