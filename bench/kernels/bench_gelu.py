"""gelu: forward with the derivative, and backward, against eager, torch.compile and a copy of as many bytes.

    pytest bench/kernels/bench_gelu.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels.gelu import gelu_backward, gelu_forward

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (M tokens, K width)
SHAPES = (
    {"B/16": (256 * 197, 3072), "L/14": (128 * 257, 4096), "g/14": (64 * 257, 6144)}
    if DEVICE == "cuda"
    else {"tiny": (4 * 197, 192)}
)


VARIANTS = ["copy", "ours", "ours fp8", "eager"] + (["compiled"] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_forward(measure, copy_of, shape, name):
    x = torch.randn(SHAPES[shape], device=DEVICE).to(DTYPE)
    num_bytes = x.numel() * (2 * x.element_size() + 1)
    calls = {
        "copy": copy_of(num_bytes) if name == "copy" else None,
        "ours": lambda: gelu_forward(x)[0],
        "ours fp8": lambda: gelu_forward(x, fp8=True)[0],
        "eager": lambda: F.gelu(x),
        "compiled": torch.compile(lambda: F.gelu(x)),
    }
    if name == "ours":
        wanted = F.gelu(x.double())
        assert (calls[name]() - wanted).norm() <= torch.finfo(DTYPE).eps * wanted.norm(), "y is wrong"
    measure(calls[name], f"gelu forward {shape}", "gelu", bytes=num_bytes, dtype=str(DTYPE))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu_backward(measure, copy_of, shape, name):
    x = torch.randn(SHAPES[shape], device=DEVICE).to(DTYPE)
    g, derivative = torch.randn_like(x), gelu_forward(x)[1]
    num_bytes = x.numel() * (2 * x.element_size() + 1)
    calls = {
        "copy": copy_of(num_bytes) if name == "copy" else None,
        "ours": lambda: gelu_backward(g, derivative)[0],
        "ours fp8": lambda: gelu_backward(g, derivative, fp8=True)[0],
        "eager": lambda: torch.ops.aten.gelu_backward(g, x),
        "compiled": torch.compile(lambda: torch.ops.aten.gelu_backward(g, x)),
    }
    if name == "ours":
        wanted = torch.ops.aten.gelu_backward(g.double(), x.double())
        assert (calls[name]() - wanted).norm() <= 8e-3 * wanted.norm(), "dx is wrong"
    measure(calls[name], f"gelu backward {shape}", "gelu", bytes=num_bytes, dtype=str(DTYPE))
