"""layer_norm: the residual add and the bare norm, and backward, against eager, torch.compile, Liger and a copy.

    pytest bench/kernels/bench_layer_norm.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels.layer_norm import layer_norm_backward, layer_norm_forward

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (M tokens, K width)
SHAPES = (
    {"B/16": (256 * 197, 768), "L/14": (128 * 257, 1024), "g/14": (64 * 257, 1536)}
    if DEVICE == "cuda"
    else {"tiny": (4 * 197, 192)}
)
RANK = 16


VARIANTS = ["copy", "ours", "ours fp8", "ours rank 16", "eager"] + (["compiled", "liger"] if DEVICE == "cuda" else [])


def eager(x, residual):
    h = x + residual
    return F.layer_norm(h, h.shape[-1:], eps=1e-6), h


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_and_norm(measure, copy_of, shape, name):
    x, residual = (torch.randn(SHAPES[shape], device=DEVICE).to(DTYPE) for _ in range(2))
    a = torch.randn(RANK, x.shape[1], device=DEVICE).to(DTYPE)
    num_bytes = 4 * x.numel() * x.element_size()
    compiled = torch.compile(eager)
    calls = {
        "copy": copy_of(num_bytes) if name == "copy" else None,
        "ours": lambda: layer_norm_forward(x, residual=residual),
        "ours fp8": lambda: layer_norm_forward(x, residual=residual, fp8=True),
        "ours rank 16": lambda: layer_norm_forward(x, residual=residual, lora_a=a),
        "eager": lambda: eager(x, residual),
        "compiled": lambda: compiled(x, residual),
        "liger": None,
    }
    if name == "liger":
        liger = pytest.importorskip("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        one, zero = torch.ones_like(a[0]), torch.zeros_like(a[0])
        calls[name] = lambda: liger.apply(x + residual, one, zero, 1e-6)
    if name.startswith("ours"):
        got, wanted = calls[name](), F.layer_norm((x + residual).double(), x.shape[-1:], eps=1e-6)
        assert (got.y - wanted).norm() <= torch.finfo(DTYPE).eps * wanted.norm(), "y is wrong"
    measure(calls[name], f"layer_norm forward {shape}", "layer_norm", bytes=num_bytes, dtype=str(DTYPE))


@pytest.mark.parametrize("name", ["copy", "ours", "ours fp8", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_with_residual(measure, copy_of, shape, name):
    x, g, gh = (torch.randn(SHAPES[shape], device=DEVICE).to(DTYPE) for _ in range(3))
    out = layer_norm_forward(x)
    num_bytes = 4 * x.numel() * x.element_size()
    mean, rstd = out.mean[:, None], out.rstd[:, None]
    native = torch.ops.aten.native_layer_norm_backward
    calls = {
        "copy": copy_of(num_bytes) if name == "copy" else None,
        "ours": lambda: layer_norm_backward(g, out.y, out.rstd, gh)[0],
        "ours fp8": lambda: layer_norm_backward(g, out.y, out.rstd, gh, fp8=True)[0],
        "eager": lambda: native(g, x, x.shape[-1:], mean, rstd, None, None, [True, False, False])[0] + gh,
    }
    if name.startswith("ours"):
        wanted = native(
            g.double(), x.double(), x.shape[-1:], mean.double(), rstd.double(), None, None, [True, False, False]
        )[0] + gh.double()  # fmt: skip
        assert (calls[name]() - wanted).norm() <= 2 * torch.finfo(DTYPE).eps * wanted.norm(), "dx is wrong"
    measure(calls[name], f"layer_norm backward {shape}", "layer_norm", bytes=num_bytes, dtype=str(DTYPE))
