"""Packs sequences of several lengths: products, norms and GELU run over all tokens, attention per length.

    groups [B_1, N_1, D], [B_2, N_2, D], ...   <->   rows [sum of B_g N_g, D], and sizes (B_g, N_g)

Attention per group equals attention over all rows under a block-diagonal mask, and needs no mask. A single group is
not packed: it stays [B, N, D], with sizes None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upstep_fast.kernels.attention import attention_backward, attention_forward

Sizes = Sequence[tuple[int, int]] | None


def sizes_of(groups: Sequence[Tensor]) -> Sizes:
    """Return (B, N) of every group [B, N, D]; None for a single group."""
    return None if len(groups) == 1 else [(len(group), group.shape[1]) for group in groups]


def pack(groups: Sequence[Tensor]) -> Tensor:
    """Pack groups [B, N, *] into rows [T, *]; a single group is returned as it is."""
    return groups[0] if len(groups) == 1 else torch.cat([group.flatten(0, 1) for group in groups])


def unpack(rows: Tensor, sizes: Sizes) -> list[Tensor]:
    """Split rows [T, *] into groups [B, N, *], as views: the inverse of `pack`."""
    if sizes is None:
        return [rows]
    parts = rows.split([batch * tokens for batch, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def attend(y: Tensor, heads: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Compute attention within each sequence: packed qkv [..., 3 D] -> (o [..., D], lse [..., H])."""
    if sizes is None:
        o, lse = attention_forward(y.unflatten(-1, (3, heads, -1)))
        return o.flatten(2), lse.mT
    outputs = [attention_forward(part.unflatten(-1, (3, heads, -1))) for part in unpack(y, sizes)]
    return pack([o.flatten(2) for o, _ in outputs]), pack([lse.mT for _, lse in outputs])


def attend_first(y: Tensor, heads: int, count: int) -> Tensor:
    """Compute `attend`'s o for the first `count` tokens of each sequence alone: [B, N, 3 D] -> [B, count, D]."""
    q, k, v = y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
    q = q[:, :, :count].float() * q.shape[-1] ** -0.5
    o = (q @ k.float().mT).softmax(-1) @ v.float()
    return o.transpose(1, 2).flatten(2).to(y.dtype)


def attend_first_backward(d_o: Tensor, y: Tensor, heads: int) -> Tensor:
    """Return the gradient of y [B, N, 3 D], from that of `attend_first`'s o, [B, count, D]; P is computed again.

    dv = P^T do, dS = P (do v^T - sum of its product with P), dq = dS k / sqrt(d), dk = dS^T q / sqrt(d)
    """
    count, scale = d_o.shape[1], (y.shape[-1] // (3 * heads)) ** -0.5
    q, k, v = (x.float() for x in y.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4))  # [B, H, N, d]
    q, d = q[:, :, :count] * scale, d_o.unflatten(-1, (heads, -1)).transpose(1, 2).float()
    p = (q @ k.mT).softmax(-1)
    d_s = p * (d_p := d @ v.mT).sub_((d_p * p).sum(-1, keepdim=True))
    d_y = torch.zeros_like(y).unflatten(-1, (3, heads, -1))
    d_q, d_k, d_v = d_y.permute(2, 0, 3, 1, 4)
    d_q[:, :, :count], d_k[:], d_v[:] = d_s @ k * scale, d_s.mT @ q, p.mT @ d
    return d_y.flatten(2)


def attend_backward(d_o: Tensor, y: Tensor, o: Tensor, lse: Tensor, heads: int, sizes: Sizes) -> Tensor:
    """Return the gradient of y, from that of o [..., D] and the input and outputs of `attend`."""
    if sizes is None:
        return _attend_backward(d_o, y, o, lse, heads)
    groups = zip(*(unpack(rows, sizes) for rows in (d_o, y, o, lse)), strict=True)
    return pack([_attend_backward(d_part, part, o_part, lse_part, heads) for d_part, part, o_part, lse_part in groups])


def _attend_backward(d_o: Tensor, y: Tensor, o: Tensor, lse: Tensor, heads: int) -> Tensor:
    split = heads, -1
    return attention_backward(
        d_o.unflatten(-1, split), y.unflatten(-1, (3, *split)), o.unflatten(-1, split), lse.mT
    ).flatten(2)


def drop_path_scale(drop_path: torch.nn.Module, x: Tensor, sizes: Sizes) -> Tensor | None:
    """Draw drop path's factor per sequence, 0 or 1 / (1 - p), by timm's module; None where nothing is dropped.

    Returns [T, 1] for rows (equal for all tokens of a sequence), [B, 1, 1] for a single group.
    """
    if not drop_path.training or not getattr(drop_path, "drop_prob", None):
        return None
    draws = [drop_path(group.new_ones(len(group), 1, 1)) for group in unpack(x, sizes)]
    return draws[0] if sizes is None else pack([d.expand(*size, 1) for d, size in zip(draws, sizes, strict=True)])


def scale_branch(branch: Tensor, drop_scale: Tensor | None) -> Tensor:
    """Multiply a branch by its factor of `drop_path_scale`, if any."""
    return branch if drop_scale is None else branch * drop_scale
