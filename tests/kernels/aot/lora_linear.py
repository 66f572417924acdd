"""Launches of kernels/lora_linear/triton.py to compile: see tests/kernels/test_aot.py."""

from __future__ import annotations

from functools import partial

import torch

from upstep_fast.kernels.lora_linear import triton as op
from upstep_fast.kernels.lora_linear.args import LoraArgs

M, K, N = 4096, 1024, 3072


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def seed():
    return torch.empty((), dtype=torch.int64, device="meta")


def forward(capability, *, dtype, rank=16, dropout=0.0, tma=True, bias=True):
    """S made in the K loop."""
    op._launch(
        empty(M, K, dtype=dtype), empty(N, K, dtype=dtype), empty(M, N, dtype=dtype),
        bias=empty(N, dtype=dtype) if bias else None,
        a=empty(rank, K, dtype=dtype), b=empty(N, rank, dtype=dtype), s=empty(M, rank, dtype=dtype),
        scale=0.5, dropout=dropout, seed=seed(), tma=tma and capability >= (9, 0),
    )  # fmt: skip


def given(capability, *, dtype, rank=16, dropout=0.0, tma=True):
    """dX: S given, the weight read by columns."""
    op._launch(
        empty(M, N, dtype=dtype), empty(N, K, dtype=dtype).T, empty(M, K, dtype=dtype),
        b=empty(rank, K, dtype=dtype).T, s=empty(M, rank, dtype=dtype), dropout=dropout, seed=seed(),
        tma=tma and capability >= (9, 0),
    )  # fmt: skip


def sweeps(capability, *, dtype, rank=16, dropout=0.0):
    """The adapter's gradients."""
    lora = LoraArgs(empty(rank, K, dtype=dtype), empty(N, rank, dtype=dtype), 0.5, dropout, seed(), [])
    op.adapter(
        empty(M, N, dtype=dtype), empty(M, K, dtype=dtype), empty(M, rank, dtype=dtype), lora, (True, True, True),
    )  # fmt: skip


def fp8(capability, *, rank=16, tma=True):
    if capability < (8, 9):
        # dispatched to another strategy there; the bf16 kernel stands in
        return forward(capability, dtype=torch.bfloat16)
    return op._launch(
        empty(M, K, dtype=torch.float8_e4m3fn), empty(N, K, dtype=torch.float8_e4m3fn),
        empty(M, N, dtype=torch.bfloat16), b=empty(N, rank, dtype=torch.bfloat16),
        s=empty(M, rank, dtype=torch.bfloat16), scales=(empty(M, dtype=torch.float32), empty(N, dtype=torch.float32)),
        tma=tma and capability >= (9, 0),
    )  # fmt: skip


CASES = {
    "forward bf16": partial(forward, dtype=torch.bfloat16),
    "given bf16": partial(given, dtype=torch.bfloat16),
    "sweeps bf16": partial(sweeps, dtype=torch.bfloat16),
    "fp8": fp8,
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LONG = {
    f"{way.__name__} {dtype} rank {rank} dropout {dropout}": partial(way, dtype=dtype, rank=rank, dropout=dropout)
    for way in (forward, given, sweeps)
    for dtype in DTYPES
    for rank in (16, 32)
    for dropout in (0.0, 0.1)
} | {
    f"{way.__name__} {dtype} pointers": partial(way, dtype=dtype, tma=False)
    for way in (forward, given)
    for dtype in DTYPES
}
LONG["fp8 pointers rank 32"] = partial(fp8, rank=32, tma=False)
