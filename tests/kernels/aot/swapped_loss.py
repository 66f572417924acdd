"""Launches of kernels/swapped_loss.py to compile: see tests/kernels/test_aot.py."""

from __future__ import annotations

from functools import partial

import torch

from upstep_fast.kernels import swapped_loss as op


def both(capability, *, shape, dtype):
    scores, targets = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(shape, device="meta")
    loss, peak, weight = op._forward_triton(scores, targets, 0.1)
    op._backward_triton(loss.mean().expand(shape[0]), scores, targets, peak, weight, 0.1)


CASES = {"fp32 2048x3000": partial(both, shape=(2048, 3000), dtype=torch.float32)}
LONG = {
    f"{dtype} {B}x{K}": partial(both, shape=(B, K), dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for B, K in ((1, 1), (128, 512), (256, 300), (4096, 8192), (1024, 65536), (65536, 16))
}
