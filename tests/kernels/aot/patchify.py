"""Launches of patchify that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.patchify import _patchify_triton


def _case(side, patch, dtype, inverse):
    def run(capability):
        images = torch.empty(8, 3, side, side, dtype=dtype, device="meta")
        patches = torch.empty(8, (side // patch) ** 2, 3 * patch * patch, dtype=torch.bfloat16, device="meta")
        _patchify_triton(images, patches, patch, inverse)

    return run


CASES = {"224 by 14 fp32 to bf16": _case(224, 14, torch.float32, False)}
LONG = {
    f"{side} by {patch} {dtype} {inverse}": _case(side, patch, dtype, inverse)
    for side, patch in ((224, 16), (518, 14), (64, 8), (256, 64), (28, 1))
    for dtype in (torch.uint8, torch.float16, torch.float32)
    for inverse in (False, True)
    if not (inverse and dtype == torch.uint8)
}
