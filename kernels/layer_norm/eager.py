"""Eager form of the bare layer norm, by the library's ops, for CPUs and for fp32; op.py has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x_hat, rstd) of x [..., K]; rstd [..., 1] in fp32 or wider."""
    # a CPU gives the statistics in the type of the weight: without one they would be rounded to bf16
    width = x.shape[-1:]
    weight = x.new_ones(width, dtype=torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else None
    bias = None if weight is None else torch.zeros_like(weight)
    x_hat, _, rstd = torch.native_layer_norm(x, width, weight, bias, eps)
    return x_hat, rstd


def backward(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor | None) -> Tensor:
    """Return the gradient of x [..., K] from d, that of x_hat, plus `around`, the gradient that bypasses the norm."""
    # the library's op, told that its input was already normalized: mean 0, rstd 1
    zero, one = (torch.full_like(rstd, value, dtype=d.dtype) for value in (0.0, 1.0))
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        d, x_hat, x_hat.shape[-1:], zero, one, None, None, [True, False, False]
    )
    dx.mul_(rstd)
    return dx if around is None else dx.add_(around)
