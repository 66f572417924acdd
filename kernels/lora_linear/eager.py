"""Plain torch forms of `lora_linear` and of its gradients, and the dropout that all forms share.

x and grad are 2-D; `lora` holds the adapter in their dtype.
    forward_*   -> (y [M, N], S [M, R]; S is empty unless `save_s`)
    adapter_*   -> (dS [M, R], dA, dB), None where `needs` (x, a, b) has no use for it
    input_*     -> dX [M, K]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .args import LoraArgs


def drop(x: Tensor, probability: float, seed: int | Tensor | None) -> Tensor:
    """Return x / (1 - p) where a hash of (seed, row, column) keeps the entry, else 0. x: [..., K], rows in order."""
    if probability == 0:
        return x
    if seed is None:
        raise ValueError("drop: a probability above 0 needs a seed, got None")
    count, width = math.prod(x.shape[:-1]), x.shape[-1]
    row = torch.arange(count, device=x.device)[:, None]
    column = torch.arange(width, device=x.device)
    # the top 31 bits: a comparison of non-negative int32 in the kernels
    is_kept = (_hash(column ^ _hash(row ^ (seed & 0xFFFFFFFF))) >> 1) >= drop_threshold(probability)
    return torch.where(is_kept.view(x.shape), x * (1 / (1 - probability)), 0)


def drop_threshold(probability: float) -> int:
    """Return the number below which hashes of 31 bits are dropped."""
    return min(round(probability * 2**31), 2**31 - 1)


def _hash(h: Tensor) -> Tensor:
    # lowbias32 (C. Wellons, "Prospecting for hash functions"), 32 bits kept in int64
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def forward_split(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, save_s: bool
) -> tuple[Tensor, Tensor]:
    """Compute the GEMM, then add the low-rank part in place."""
    y = F.linear(x, weight, bias)
    s = drop(x, lora.dropout, lora.seed) @ lora.a.T
    for span, ranks, block in lora.adapters(weight.shape[0]):
        y[:, span].addmm_(s[:, ranks], block.T, alpha=lora.scale)
    return y, s if save_s else _empty_s(x, lora)


def forward_wide_k(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, save_s: bool
) -> tuple[Tensor, Tensor]:
    """Compute one GEMM over K+R: [x, S] [W, scale B]^T."""
    (M, K), N, R = x.shape, weight.shape[0], lora.a.shape[0]
    # cuBLAS wants rows of 16 bytes
    width = K + -(-R // 8) * 8
    x_wide, w_wide = x.new_empty(M, width), weight.new_empty(N, width)
    x_wide[:, :K], x_wide[:, K + R :] = x, 0
    w_wide[:, :K], w_wide[:, K:] = weight, 0
    torch.mm(x, lora.a.T, out=x_wide[:, K : K + R])
    for span, ranks, block in lora.adapters(N):
        w_wide[span, K + ranks.start : K + ranks.stop] = lora.scale * block
    return F.linear(x_wide, w_wide, bias), x_wide[:, K : K + R].clone() if save_s else _empty_s(x, lora)


def forward_merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora: LoraArgs, save_s: bool
) -> tuple[Tensor, Tensor]:
    """Round W + scale B A once, then compute the bare GEMM."""
    y = F.linear(x, _merge(weight, lora), bias)
    return y, x @ lora.a.T if save_s else _empty_s(x, lora)


def _merge(weight: Tensor, lora: LoraArgs) -> Tensor:
    if not lora.rows:
        return torch.addmm(weight, lora.b, lora.a, alpha=lora.scale)
    merged = weight.clone()
    for span, ranks, block in lora.adapters(weight.shape[0]):
        merged[span].addmm_(block, lora.a[ranks], alpha=lora.scale)
    return merged


def _empty_s(x: Tensor, lora: LoraArgs) -> Tensor:
    return x.new_empty(0, lora.a.shape[0])


def adapter_split(
    grad: Tensor, x: Tensor | None, s: Tensor, lora: LoraArgs, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the adapter's gradients in three library products."""
    need_x, need_a, need_b = needs
    ds = grad.new_empty(grad.shape[0], lora.a.shape[0]) if need_x or need_a else None
    db = torch.empty_like(lora.b, memory_format=torch.contiguous_format) if need_b else None
    first = 0
    for span, ranks, block in lora.adapters(grad.shape[1]):
        if ds is not None:
            ds[:, ranks].addmm_(grad[:, span], block, beta=0, alpha=lora.scale)
        if db is not None:
            db[first : first + len(block)].addmm_(grad[:, span].T, s[:, ranks], beta=0, alpha=lora.scale)
        first += len(block)
    if not need_a:
        return ds, None, db
    assert ds is not None and x is not None
    return ds, ds.T @ drop(x, lora.dropout, lora.seed), db


def input_split(grad: Tensor, weight: Tensor, ds: Tensor, lora: LoraArgs) -> Tensor:
    """Compute the GEMM, then add dS A in place."""
    return add_input_gradient(grad @ weight, ds, lora)


def add_input_gradient(dx: Tensor, ds: Tensor, lora: LoraArgs) -> Tensor:
    """Add the adapter's part, drop'(dS A), to the frozen weight's gradient dx [M, K], in place; returns dx."""
    return dx.addmm_(ds, lora.a) if lora.dropout == 0 else dx.add_(drop(ds @ lora.a, lora.dropout, lora.seed))


def input_merged(grad: Tensor, weight: Tensor, ds: Tensor, lora: LoraArgs) -> Tensor:
    """Compute one GEMM with the merged weight: the exact gradient of `forward_merged`."""
    return grad @ _merge(weight, lora)
