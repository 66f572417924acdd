"""Launches of kernels/sinkhorn/op.py to compile: see tests/kernels/test_aot.py."""

from __future__ import annotations

import importlib
from functools import partial
from unittest import mock

import torch

op = importlib.import_module("upstep_fast.kernels.sinkhorn.triton")

# the cut of a problem follows the number of processors: an H200's
of_h200 = mock.patch.object(op, "_resident_warps", lambda device: 16 * 132)


@of_h200
def one_launch(capability, *, shape, dtype):
    op.assignments(torch.empty(shape, dtype=dtype, device="meta"), 0.05, 3)


@of_h200
def passes(capability, *, shape, dtype):
    scores = torch.empty(shape, dtype=dtype, device="meta")
    peak, total = op.columns(scores, 0.05)
    op.rows(scores, 0.05, peak, total)
    op.assign(scores, 0.05, peak, total)


CASES = {
    "one launch fp32 128x512": partial(one_launch, shape=(128, 512), dtype=torch.float32),
    "one launch of two fp32 256x300": partial(one_launch, shape=(2, 256, 300), dtype=torch.float32),
    "one launch fp32 4096x8192": partial(one_launch, shape=(4096, 8192), dtype=torch.float32),
    "passes bf16 2048x3000": partial(passes, shape=(2048, 3000), dtype=torch.bfloat16),
}
SHAPES = ((1, 1), (128, 512), (256, 300), (2048, 3000), (4096, 8192), (1024, 65536), (65536, 16))
LONG = {
    f"{way.__name__} {dtype} {'x'.join(map(str, shape))}": partial(way, shape=shape, dtype=dtype)
    for way in (one_launch, passes)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for shape in (*SHAPES, (2, 128, 512), (10, 64, 8193))
}
