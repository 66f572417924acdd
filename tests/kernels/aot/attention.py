"""Launches of attention that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.attention.triton import backward as backward_triton
from upstep_fast.kernels.attention.triton import backward_by_heads
from upstep_fast.kernels.attention.triton import forward as forward_triton

SMALL_GPUS = (8, 0), (8, 9), (12, 0)  # not offered a whole head: `fits_heads`


def _case(T, D, dtype, backward=None, B=8):
    def run(capability):
        qkv = torch.empty(B, T, 3, 16, D, dtype=dtype, device="meta")
        if backward:
            out, lse = qkv.new_empty(B, T, 16, D), qkv.new_empty(B, 16, T, dtype=torch.float32)
            form = backward_triton if capability in SMALL_GPUS else backward
            form(out, qkv, out, lse, 0.125)
        else:
            forward_triton(qkv, 0.125)

    return run


CASES = {
    "forward 257 bf16": _case(257, 64, torch.bfloat16),
    # no tokens over the edge of a tile: the interpreter would ignore an argument that no kernel has
    "forward 256 bf16": _case(256, 64, torch.bfloat16),
    "backward 257 bf16": _case(257, 64, torch.bfloat16, backward_triton),
    "backward by heads 257 bf16": _case(257, 64, torch.bfloat16, backward_by_heads),
    # the same kernel; more heads than a grid's second dimension has places
    "forward 257 bf16 8192 images": _case(257, 64, torch.bfloat16, B=8192),
}
LONG = {
    f"{T} {D} {dtype} {'backward' if backward else 'forward'}": _case(T, D, dtype, backward)
    for T, D in ((256, 64), (197, 64), (233, 80), (300, 128), (257, 32))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for backward in (None, backward_triton)
} | {
    f"by heads {T} {D} {dtype}": _case(T, D, dtype, backward_by_heads)
    for T, D in ((256, 64), (197, 64), (261, 32), (50, 40))
    for dtype in (torch.float16, torch.bfloat16)
}
