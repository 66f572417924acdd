"""Launches of gelu that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.gelu import APPROXIMATIONS, _gelu_bwd_triton, _gelu_fwd_triton
from upstep_fast.kernels.quantize import MAX_ROW

M = 4096


def _forward(K, dtype, approximate, fp8):
    def run(capability):
        x = torch.empty(M, K, dtype=dtype, device="meta")
        _gelu_fwd_triton(x, approximate, True, fp8, native=capability >= (8, 9))

    return run


def _backward(K, dtype, fp8):
    def run(capability):
        grad = torch.empty(M, K, dtype=dtype, device="meta")
        _gelu_bwd_triton(grad, grad.new_empty(M, K, dtype=torch.uint8), fp8, native=capability >= (8, 9))

    return run


CASES = {
    "forward bf16": _forward(4096, torch.bfloat16, "none", False),
    "forward bf16 to fp8": _forward(4096, torch.bfloat16, "none", True),
    "backward bf16 to fp8": _backward(4096, torch.bfloat16, True),
}
LONG = {
    f"{K} {dtype} {approximate} {fp8}": _forward(K, dtype, approximate, fp8)
    for K in (200, 5632, MAX_ROW)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for approximate in APPROXIMATIONS
    for fp8 in (False, True)
} | {
    f"backward {K} {dtype} {fp8}": _backward(K, dtype, fp8)
    for K in (200, 5632, MAX_ROW)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for fp8 in (False, True)
}
