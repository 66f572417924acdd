"""Launches of layer_norm that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.layer_norm.triton import backward, forward
from upstep_fast.kernels.quantize import MAX_ROW


def _forward(K, dtype, rank=0, weight=False, fp8=True):
    def run(capability):
        x = torch.empty(4096, K, dtype=dtype, device="meta")
        a = x.new_empty(rank, K) if rank else None
        w = x.new_empty(K) if weight else None
        forward(x, x, w, w, a, 1e-6, True, fp8, capability >= (8, 9))

    return run


def _backward(K, dtype, weight=False, fp8=True):
    def run(capability):
        grad, stats = torch.empty(4096, K, dtype=dtype, device="meta"), torch.empty(4096, device="meta")
        w = grad.new_empty(K) if weight else None
        backward(grad, grad, stats, stats, w, grad, weight, fp8, capability >= (8, 9), 132)

    return run


CASES = {
    "forward bf16 rank 16 to fp8": _forward(1024, torch.bfloat16, 16),
    "backward bf16 to fp8": _backward(1024, torch.bfloat16),
    "backward bf16 weight": _backward(1024, torch.bfloat16, weight=True, fp8=False),
}
LONG = {
    f"forward {K} {dtype} {rank} {weight}": _forward(K, dtype, rank, weight)
    for K, rank in ((200, 1), (1024, 64), (1408, 16), (5632, 0), (MAX_ROW, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for weight in (False, True)
    if not (rank and weight)
} | {
    f"backward {K} {dtype} {weight}": _backward(K, dtype, weight, not weight)
    for K in (200, 1408, 5632, MAX_ROW)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for weight in (False, True)
}
