"""The gradients of a low-rank adapter of T parts beside a frozen projection, from dy [M, N] and its input x [M, K].

    low   = x A^T + shift    [M, T r]        d_low = dy_t b_t for each part t, on its n columns of dy
    d_A   = d_low^T x        [T r, K]        d_shift = sum of d_low over M        d_b_t = dy_t^T low_t    [n, r]

Forms: `cpp` on a CPU (csrc/adapter_cpu.cpp: dy and x read once, by blocks that stay in the cache; sums in fp32, in an
order that does not depend on the threads) and the library's products, in the dtype of dy. On a CPU the one measured as
faster runs (_fastest_on_cpu.py). `cpp` against the library, one thread of an AMD EPYC (Zen 4), torch 2.14, processor
time, at [2080, 576] and [2080, 192] with r = 8 for q, k and v: 3.6 to 3.9 times as fast in fp32; in bf16 9 times with
AVX2, 1.4 with AVX512-BF16, whose instruction takes pairs of terms (bench/results/cpu_passes_*.json).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .block_passes import form_of, unsupported_reason

_ROWS = 256  # of a chunk, which has sums of its own
_CHUNKS = 16  # at most

Gradients = tuple[Tensor, Tensor, Tensor]


def adapter_gradients(dy: Tensor, x: Tensor, a: Tensor, shift: Tensor, b: Tensor, first: Sequence[int]) -> Gradients:
    """Return (d_A [T r, K], d_shift [T r] in fp32, d_b [T, n, r]); d_A and d_b in the dtype of the tensors.

    dy: [M, N]; x: [M, K]; a: [T r, K]; shift: [T r]; b: [T, n, r]; first: the first column of dy of each part. Outside
    autograd, on any device.
    """
    args = dy, x, a, shift, b, first
    forms = {"cpp": lambda: _cpp(*args), "reference": lambda: library(*args)}
    reason = unsupported_reason(dy, x, a, shift, b, op="block_adapter_gradients")
    problem = f"adapter_gradients K{x.shape[1]} r{b.shape[2]} T{len(b)} n{b.shape[1]}"
    return forms[form_of(problem, forms, reason, dy)]()


def library(dy: Tensor, x: Tensor, a: Tensor, shift: Tensor, b: Tensor, first: Sequence[int]) -> Gradients:
    """Compute `adapter_gradients` by two products for each part, and two for all."""
    r = b.shape[2]
    low, columns = F.linear(x, a, shift), [slice(start, start + b.shape[1]) for start in first]
    d_low = d_low_of(dy, b, first)
    d_b = [dy[:, span].T @ low[:, i * r : (i + 1) * r] for i, span in enumerate(columns)]
    return d_low.T @ x, d_low.sum(0, dtype=torch.float32), d_b[0][None] if len(d_b) == 1 else torch.stack(d_b)


def d_low_of(dy: Tensor, b: Tensor, first: Sequence[int]) -> Tensor:
    """Compute the gradient of low [M, T r] from dy [M, N]."""
    products = [dy[:, start : start + b.shape[1]] @ block for start, block in zip(first, b, strict=True)]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


def _cpp(dy: Tensor, x: Tensor, a: Tensor, shift: Tensor, b: Tensor, first: Sequence[int]) -> Gradients:
    chunks = max(1, min(_CHUNKS, -(-len(dy) // _ROWS)))
    partial = dy.new_empty((chunks, a.numel() + len(a) + b.numel()), dtype=torch.float32)
    torch.ops.upstep_ops.block_adapter_gradients(dy, x, a, shift, b, torch.tensor(first), partial)
    d_a, d_shift, d_b = partial[0].split([a.numel(), len(a), b.numel()])
    return d_a.view_as(a).to(dy.dtype), d_shift, d_b.view_as(b).to(dy.dtype)
