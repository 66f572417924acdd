"""Launches of kernels/sinkhorn/scored.py to compile: see tests/kernels/test_aot.py."""

from __future__ import annotations

import importlib
from functools import partial
from unittest import mock

import torch

op = importlib.import_module("upstep_fast.kernels.sinkhorn.scored")
fused = importlib.import_module("upstep_fast.kernels.sinkhorn.triton")


# the cut of a problem follows the number of processors: an H200's
@mock.patch.object(fused, "_resident_warps", lambda device: 16 * 132)
def one_launch(capability, *, shape, dtype):
    B, K, D = shape
    op._fused(*(torch.empty(n, D, dtype=dtype, device="meta") for n in (B, K)), 0.05, 3)


CASES = {
    f"{dtype} {B}x{K}x{D}": partial(one_launch, shape=(B, K, D), dtype=dtype)
    for dtype, B, K, D in ((torch.float32, 128, 512, 128), (torch.bfloat16, 2048, 3000, 128))
}
LONG = {
    f"{dtype} {B}x{K}x{D}": partial(one_launch, shape=(B, K, D), dtype=dtype)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for B, K, D in ((1, 1, 1), (256, 300, 100), (4096, 8192, 256), (1024, 65536, 128), (65536, 16, 64))
}
