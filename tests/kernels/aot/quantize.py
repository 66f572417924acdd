"""Launches of quantize that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.quantize import MAX_ROW, _quantize_triton


def _case(K, dtype):
    def run(capability):
        _quantize_triton(torch.empty(4096, K, dtype=dtype, device="meta"), native=capability >= (8, 9))

    return run


CASES = {"bf16": _case(1024, torch.bfloat16)}
LONG = {
    f"{K} {dtype}": _case(K, dtype)
    for K in (200, 1408, 5632, MAX_ROW)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
}
