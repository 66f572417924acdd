"""patchify: patches and one product against the strided convolution, and the patches alone against a copy.

    pytest bench/kernels/bench_patchify.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels.patchify import patchify, patchify_reference

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (B images, side, patch, width)
SHAPES = (
    {"B/16": (256, 224, 16, 768), "L/14": (128, 224, 14, 1024), "H/14 518": (32, 518, 14, 1280)}
    if DEVICE == "cuda"
    else {"tiny": (4, 64, 8, 192)}
)


@pytest.mark.parametrize("name", ["copy", "ours", "eager", "convolution", "ours and product"])
@pytest.mark.parametrize("shape", SHAPES)
def test_patchify(measure, copy_of, shape, name):
    B, side, patch, width = SHAPES[shape]
    images = torch.randn(B, 3, side, side, device=DEVICE).to(DTYPE)
    weight = (torch.randn(width, 3, patch, patch, device=DEVICE) / (3 * patch * patch) ** 0.5).to(DTYPE)
    num_bytes = 2 * images.numel() * images.element_size()
    calls = {
        "copy": copy_of(num_bytes) if name == "copy" else None,
        "ours": lambda: patchify(images, patch),
        "eager": lambda: patchify_reference(images, patch, DTYPE),
        "convolution": lambda: F.conv2d(images, weight, stride=patch).flatten(2).mT,
        "ours and product": lambda: patchify(images, patch) @ weight.flatten(1).T,
    }
    if name == "ours":
        assert torch.equal(calls["ours"](), calls["eager"]()), "patches are wrong"
    measure(calls[name], f"patchify {shape}", "patchify", bytes=num_bytes, dtype=str(DTYPE))
