"""The compiled form of attention, for CPUs: csrc/attention_cpu.cpp, one head at a time with its scores in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import native_unsupported_reason
from .triton import outputs

DTYPES = (torch.float32, torch.bfloat16)


def unsupported_reason(qkv: Tensor) -> str | None:
    """Return why this form cannot take `qkv`, or None."""
    if qkv.dtype not in DTYPES:
        return f"no form for {qkv.dtype}"
    return native_unsupported_reason("cpp", qkv.device, "block_attention")


def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out [B, T, H, d], lse [B, H, T]) of contiguous qkv [B, T, 3, H, d]."""
    out, lse = outputs(qkv)
    torch.ops.upstep_ops.block_attention(qkv, scale, out, lse)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv [B, T, 3, H, d] from contiguous tensors."""
    dqkv = torch.empty_like(qkv)
    torch.ops.upstep_ops.block_attention_backward(grad.to(qkv.dtype), qkv, out, lse, scale, dqkv)
    return dqkv
