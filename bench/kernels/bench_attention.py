"""attention: each way, forward and backward apart, packed gradient included; xformers beside them.

    pytest bench/kernels/bench_attention.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

import pytest
import torch

from upstep_fast.kernels.attention import attention_backward_reference, attention_reference
from upstep_fast.kernels.attention.op import _BACKWARD, _FORWARD

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (B images, T tokens, H heads, d head width)
SHAPES = (
    {
        "L/14": (128, 257, 16, 64), "L/14 registers": (128, 261, 16, 64), "B/16": (256, 197, 12, 64),
        "L/14 518": (32, 1370, 16, 64), "g/14": (64, 257, 16, 88), "H/14": (64, 257, 16, 80),
    }
    if DEVICE == "cuda"
    else {"tiny": (4, 65, 3, 64)}
)  # fmt: skip
WAYS = ["flash", "cudnn", "triton"] if DEVICE == "cuda" else ["sdpa", "reference"]


def tensors(shape: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    B, T, H, D = SHAPES[shape]
    torch.manual_seed(0)
    return (
        torch.randn(B, T, 3, H, D, device=DEVICE).to(DTYPE),
        torch.randn(B, T, H, D, device=DEVICE).to(DTYPE),
        D**-0.5,
    )


def right(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return ((got - wanted).norm() <= max(2 * torch.finfo(DTYPE).eps, 1e-5) * wanted.norm()).item()


@pytest.mark.parametrize("name", [*WAYS, "xformers"] if DEVICE == "cuda" else WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_forward(measure, shape, name):
    qkv, _, scale = tensors(shape)
    if name == "xformers":
        ops = pytest.importorskip("xformers.ops")
        call = lambda: (ops.memory_efficient_attention(*qkv.unbind(2), scale=scale),)  # noqa: E731
    else:
        call = lambda: _FORWARD[name](qkv, scale)  # noqa: E731
    few = qkv[:2].double()
    assert right(call()[0][:2], attention_reference(few, scale)[0]), f"{name}: out is wrong; no time given"
    num_bytes = 4 * qkv.numel() // 3 * qkv.element_size()
    measure(call, f"attention forward {shape}", "attention", bytes=num_bytes, dtype=str(DTYPE))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_backward(measure, shape, name):
    qkv, grad, scale = tensors(shape)
    out, lse = (t.contiguous() for t in _FORWARD[name](qkv, scale))
    call = lambda: _BACKWARD[name](grad, qkv, out, lse, scale)  # noqa: E731
    few = [t[:2].double() for t in (grad, qkv)]
    wanted = attention_backward_reference(*few, *attention_reference(few[1], scale), scale)
    assert right(call()[:2], wanted), f"{name}: dqkv is wrong; no time given"
    num_bytes = 8 * qkv.numel() // 3 * qkv.element_size()
    measure(call, f"attention backward {shape}", "attention", bytes=num_bytes, dtype=str(DTYPE))
