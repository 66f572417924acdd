"""LoSA's side network in the fewest lines of plain torch, in whatever precision it is given.

Nothing is shared with the code that is fast (methods/supervised/losa.py), nor does anything here save memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor, Tensor]  # down [r, n], its bias [r], up [n, r], its bias [n]


def mix(x: Tensor, axis: int, factors: Factors, eps: float) -> Tensor:
    """W2 gelu(W1 LN(x) + b1) + b2 along one axis of x; LN without scale and shift, over the last axis."""
    down, down_bias, up, up_bias = factors
    normed = F.layer_norm(x, x.shape[-1:], eps=eps).movedim(axis, -1)
    return (F.gelu(normed @ down.T + down_bias) @ up.T + up_bias).movedim(-1, axis)


def refine(
    taps: Sequence[Tensor],
    adaptors: Sequence[Sequence[tuple[int, Factors]]],
    *,
    combine: str = "sum",
    gates: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    start: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """z from the frozen blocks' outputs.

    taps: b_l, each [B, N, D], or [B, T, N, D] for clips. adaptors: for each its mixers (axis, factors) in order.
    gates, scales: one scalar an adaptor. start: a_0, broadcast. Formulas: methods/supervised/losa.py.
    """
    a = torch.zeros_like(taps[0]) if start is None else start.expand_as(taps[0])
    for level, (b, mixers) in enumerate(zip(taps, adaptors, strict=True)):
        share = gates[level].sigmoid() if combine == "gated" else None
        u = b + a if share is None else share * b + (1 - share) * a
        x = u
        for axis, factors in mixers:
            x = x + mix(x, axis, factors, eps)
        change = (scales[level] if scales else 1.0) * (x - u)
        a = (b if combine == "replace" else a) + change
    return a if combine == "replace" else taps[-1] + a
