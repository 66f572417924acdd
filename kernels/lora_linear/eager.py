"""The plain torch forms of `lora_linear` and of its gradients, and the dropout all forms share.

Signatures (2-D x and grad; a and b in their dtype; rows flat: start and stop in turn, empty for all rows):
    forward_*   (x, weight, bias, a, b, scale, dropout, seed, rows, keep) -> (y, S; empty unless `keep`)
    adapter_*   (grad, x, a, b, s, scale, dropout, seed, rows, needs) -> (dS, dA, dB), None where not needed
    input_*     (grad, weight, ds, a, b, scale, dropout, seed, rows) -> dX
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def drop(x: Tensor, probability: float, seed: int | Tensor) -> Tensor:
    """X / (1 - p) where a hash of (seed, row, column) keeps it, else 0. x: [..., K], its rows in order."""
    if probability == 0:
        return x
    count, width = math.prod(x.shape[:-1]), x.shape[-1]
    row = torch.arange(count, device=x.device)[:, None]
    column = torch.arange(width, device=x.device)
    # the top 31 bits: a comparison of non-negative int32 in the kernels
    kept = (_hash(column ^ _hash(row ^ (seed & 0xFFFFFFFF))) >> 1) >= drop_threshold(probability)
    return torch.where(kept.view(x.shape), x * (1 / (1 - probability)), 0)


def drop_threshold(probability: float) -> int:
    """Hashes of 31 bits below this are dropped."""
    return min(round(probability * 2**31), 2**31 - 1)


def _hash(h: Tensor) -> Tensor:
    # lowbias32 (C. Wellons, "Prospecting for hash functions"), 32 bits kept in int64
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def parts(rows: Sequence[int], num_rows: int, lora_b: Tensor) -> list[tuple[slice, slice, Tensor]]:
    """(rows of W, ranks, block of B) of each adapter. rows: flat, start and stop in turn; empty: all rows."""
    rows = rows or [0, num_rows]
    r = lora_b.shape[1]
    spans = [slice(*rows[i : i + 2]) for i in range(0, len(rows), 2)]
    blocks = lora_b.split([span.stop - span.start for span in spans])
    return [(span, slice(t * r, t * r + r), block) for t, (span, block) in enumerate(zip(spans, blocks, strict=True))]


def forward_split(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    """The GEMM, then the low-rank part added in place."""
    y = F.linear(x, weight, bias)
    s = drop(x, dropout, seed) @ a.T
    for span, ranks, block in parts(rows, weight.shape[0], b):
        y[:, span].addmm_(s[:, ranks], block.T, alpha=scale)
    return y, s if keep else _empty_s(x, a)


def forward_wide_k(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    """One GEMM over K+R: [x, S] [W, scale B]^T."""
    (M, K), N, R = x.shape, weight.shape[0], a.shape[0]
    # cuBLAS wants rows of 16 bytes
    width = K + -(-R // 8) * 8
    x_wide, w_wide = x.new_empty(M, width), weight.new_empty(N, width)
    x_wide[:, :K], x_wide[:, K + R :] = x, 0
    w_wide[:, :K], w_wide[:, K:] = weight, 0
    torch.mm(x, a.T, out=x_wide[:, K : K + R])
    for span, ranks, block in parts(rows, N, b):
        w_wide[span, K + ranks.start : K + ranks.stop] = scale * block
    return F.linear(x_wide, w_wide, bias), x_wide[:, K : K + R].clone() if keep else _empty_s(x, a)


def forward_merged(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    """W + scale B A, rounded once, then the bare GEMM."""
    y = F.linear(x, _merge(weight, a, b, scale, rows), bias)
    return y, x @ a.T if keep else _empty_s(x, a)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float, rows: Sequence[int]) -> Tensor:
    if not rows:
        return torch.addmm(weight, b, a, alpha=scale)
    merged = weight.clone()
    for span, ranks, block in parts(rows, weight.shape[0], b):
        merged[span].addmm_(block, a[ranks], alpha=scale)
    return merged


def _empty_s(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(0, a.shape[0])


def adapter_split(grad, x, a, b, s, scale, dropout, seed, rows, needs):
    """Three library products."""
    need_x, need_a, need_b = needs
    ds = grad.new_empty(grad.shape[0], a.shape[0]) if need_x or need_a else None
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if need_b else None
    taken = 0
    for span, ranks, block in parts(rows, grad.shape[1], b):
        if ds is not None:
            ds[:, ranks].addmm_(grad[:, span], block, beta=0, alpha=scale)
        if db is not None:
            db[taken : taken + len(block)].addmm_(grad[:, span].T, s[:, ranks], beta=0, alpha=scale)
        taken += len(block)
    return ds, ds.T @ drop(x, dropout, seed) if need_a else None, db


def input_split(grad, weight, ds, a, b, scale, dropout, seed, rows):
    """The GEMM, then dS A added in place."""
    dx = grad @ weight
    return dx.addmm_(ds, a) if dropout == 0 else dx.add_(drop(ds @ a, dropout, seed))


def input_merged(grad, weight, ds, a, b, scale, dropout, seed, rows):
    """One GEMM with the merged weight: the exact gradient of `forward_merged`."""
    return grad @ _merge(weight, a, b, scale, rows)
