"""Sequences of several lengths as one tensor: products, norms and GELU run over all tokens, attention length by length.

    groups [B_1, N_1, D], [B_2, N_2, D], ...   <->   rows [sum of B_g N_g, D], and sizes (B_g, N_g)

Attention within each group is attention under a block-diagonal mask over the rows, and needs no mask. A group alone
stays [B, N, D] as it is; its sizes are None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upstep_fast.kernels.attention import attention_backward, attention_forward

Sizes = Sequence[tuple[int, int]] | None


def sizes_of(groups: Sequence[Tensor]) -> Sizes:
    """(sequences, tokens in each) of every group [B, N, D]."""
    return None if len(groups) == 1 else [(len(group), group.shape[1]) for group in groups]


def pack(groups: Sequence[Tensor]) -> Tensor:
    """Group [B, N, *] -> rows [T, *]; a group alone as it is."""
    return groups[0] if len(groups) == 1 else torch.cat([group.flatten(0, 1) for group in groups])


def unpack(rows: Tensor, sizes: Sizes) -> list[Tensor]:
    """What `pack` was given, as views."""
    if sizes is None:
        return [rows]
    parts = rows.split([batch * tokens for batch, tokens in sizes])
    return [part.unflatten(0, size) for part, size in zip(parts, sizes, strict=True)]


def attend(y: Tensor, heads: int, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt d) v within each sequence: packed qkv [..., 3 D] -> (o [..., D], lse [..., H])."""
    outputs = [attention_forward(part.unflatten(-1, (3, heads, -1))) for part in unpack(y, sizes)]
    return pack([o.flatten(2) for o, _ in outputs]), pack([lse.mT for _, lse in outputs])


def attend_backward(d_o: Tensor, y: Tensor, o: Tensor, lse: Tensor, heads: int, sizes: Sizes) -> Tensor:
    """The gradient of y, from that of o and what `attend` took and gave."""
    groups = zip(*(unpack(rows, sizes) for rows in (d_o, y, o, lse)), strict=True)
    gradients = []
    for d_part, y_part, o_part, lse_part in groups:
        qkv = y_part.unflatten(-1, (3, heads, -1))
        d_part, o_part = (part.unflatten(-1, (heads, -1)) for part in (d_part, o_part))
        gradients.append(attention_backward(d_part, qkv, o_part, lse_part.mT).flatten(2))
    return pack(gradients)


def draw_path(path: torch.nn.Module, x: Tensor, sizes: Sizes) -> Tensor | None:
    """The factor of drop path, 0 or 1 / (1 - p), one draw a sequence by timm's own module; None: nothing drops.

    [T, 1] for rows, the same for all tokens of a sequence; [B, 1, 1] for a group alone.
    """
    if not path.training or not getattr(path, "drop_prob", None):
        return None
    draws = [path(group.new_ones(len(group), 1, 1)) for group in unpack(x, sizes)]
    return draws[0] if sizes is None else pack([d.expand(*size, 1) for d, size in zip(draws, sizes, strict=True)])
