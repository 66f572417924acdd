"""What tests/test_aot.py compiles of views."""

from __future__ import annotations

import torch

from upstep_fast.kernels.views import _crop_resize_triton


def _case(channels, size, interpolation):
    def run(capability):
        pixels = torch.empty(1 << 20, dtype=torch.uint8, device="meta")
        places = torch.empty(8, 4, dtype=torch.int64, device="meta")
        boxes = torch.empty(16, 6, dtype=torch.int32, device="meta")
        out = torch.empty(16, channels, size, size, device="meta")
        _crop_resize_triton(pixels, places, boxes, out, interpolation)

    return run


CASES = {"3 channels, 224, bilinear": _case(3, 224, "bilinear"), "3 channels, 224, bicubic": _case(3, 224, "bicubic")}
LONG = {
    f"{channels} channels, {size}, {interpolation}": _case(channels, size, interpolation)
    for channels in (1, 3, 13)
    for size in (33, 64, 518)
    for interpolation in ("bilinear", "bicubic")
}
