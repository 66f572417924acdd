"""patchify: patches and one product against the strided convolution, and the patches alone against a copy.

    pytest bench/bench_patchify.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.patchify import patchify, patchify_reference

OP = "patchify"
DEVICE, DTYPE, CALLS = ("cuda", torch.bfloat16, 10) if torch.cuda.is_available() else ("cpu", torch.float32, 1)
# name: (B images, side, patch, width)
SHAPES = (
    {"B/16": (256, 224, 16, 768), "L/14": (128, 224, 14, 1024), "H/14 518": (32, 518, 14, 1280)}
    if DEVICE == "cuda"
    else {"tiny": (4, 64, 8, 192)}
)


def measure(benchmark, call: Callable[[], object], group: str, num_bytes: int) -> None:
    """Times `call`; `bytes` is what the op has to move, to be held against the time of the `copy` of its group."""

    def run() -> None:
        for _ in range(CALLS):
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.extra_info |= {
        "bytes": num_bytes, "dtype": str(DTYPE), "calls": CALLS,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "ran": {c.op: c.implementation for c in _dispatch.report() if c.op.startswith(OP)},
    }  # fmt: skip
    benchmark.pedantic(run, warmup_rounds=3, rounds=20)


def copy_of(num_bytes: int) -> Callable[[], object]:
    """A copy that moves as many bytes, half of them in and half out: the speed of memory."""
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@pytest.mark.parametrize("name", ["copy", "ours", "eager", "convolution", "ours and product"])
@pytest.mark.parametrize("shape", SHAPES)
def test_patchify(benchmark, shape, name):
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
    measure(benchmark, calls[name], f"patchify {shape}", num_bytes)
