"""Launches of views that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.views.triton import views_triton


def _case(channels, size, interpolation, taps, patch, dtype):
    def run(capability):
        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        pixels, places = empty(1 << 20, dtype=torch.uint8), empty(8, 4, dtype=torch.int64)
        boxes, factors, mean = empty(16, 6, dtype=torch.int32), empty(16, 7), empty(channels)
        out = empty(16, channels, size, size, dtype=dtype)
        views_triton(pixels, places, boxes, factors, mean, mean, out, size, size, interpolation, (taps, taps), patch)

    return run


CASES = {
    "224, bilinear, patches of 16 in bf16": _case(3, 224, "bilinear", 1, 16, torch.bfloat16),
    "224, bicubic, blur, patches of 14 in bf16": _case(3, 224, "bicubic", 23, 14, torch.bfloat16),
    "5 channels, 64, blur, fp32": _case(5, 64, "bilinear", 7, 0, torch.float32),
}
LONG = {
    f"{channels} channels, {size}, {interpolation}, {taps} taps, patch {patch}, {dtype}": _case(
        channels, size, interpolation, taps, patch, dtype
    )
    for channels in (1, 3, 13)
    for size, patch in ((33, 0), (64, 8), (518, 14))
    for interpolation in ("bilinear", "bicubic")
    for taps in (1, 23)
    for dtype in (torch.float16, torch.float32)
}
