"""What tests/test_aot.py compiles of recolour."""

from __future__ import annotations

import torch

from upstep_fast.kernels.recolour import _recolour_triton


def _case(channels, side, patch, dtype):
    def run(capability):
        x = torch.empty(16, channels, side, side, device="meta")
        factors = torch.empty(16, 6, device="meta")
        mean = torch.empty(channels, device="meta")
        shape = (16, (side // patch) ** 2, channels * patch * patch) if patch else x.shape
        _recolour_triton(x, factors, mean, mean, torch.empty(shape, dtype=dtype, device="meta"), patch)

    return run


CASES = {
    "3 channels, 224, patches of 16 in bf16": _case(3, 224, 16, torch.bfloat16),
    "5 channels, 64, fp32": _case(5, 64, 0, torch.float32),
}
LONG = {
    f"{channels} channels, {side}, patch {patch}, {dtype}": _case(channels, side, patch, dtype)
    for channels in (1, 3, 13)
    for side, patch in ((224, 14), (518, 14), (64, 8), (33, 0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
}
