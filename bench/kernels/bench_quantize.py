"""quantize: one pass against eager, torch.compile and a copy of as many bytes.

    pytest bench/kernels/bench_quantize.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import pytest
import torch

from upstep_fast.kernels.quantize import dequantize, quantize, quantize_reference

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (M tokens, K width)
SHAPES = (
    {"B/16": (256 * 197, 768), "L/14": (128 * 257, 1024), "g/14": (64 * 257, 1536)}
    if DEVICE == "cuda"
    else {"tiny": (4 * 197, 192)}
)


VARIANTS = ["copy", "ours", "eager"] + (["compiled"] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(measure, copy_of, shape, name):
    M, K = SHAPES[shape]
    x = torch.randn(M, K, device=DEVICE).to(DTYPE)
    num_bytes = M * K * (x.element_size() + 1) + 4 * M
    compiled = torch.compile(quantize_reference) if name == "compiled" else None
    way = {"ours": quantize, "eager": quantize_reference, "compiled": compiled, "copy": None}[name]
    if way is not None:
        back, scale = dequantize(*way(x)), x.float().abs().amax(1, keepdim=True) / 448
        assert ((back - x).abs() <= (x.float().abs() / 16).maximum(scale * 2**-10) * 1.001).all(), f"{name} is wrong"
    call = copy_of(num_bytes) if way is None else lambda: way(x)
    measure(call, f"quantize {shape}", "quantize", bytes=num_bytes, dtype=str(DTYPE))
