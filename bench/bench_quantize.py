"""quantize: one pass against eager, torch.compile and a copy of as many bytes.

    pytest bench/bench_quantize.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.quantize import dequantize, quantize, quantize_reference

OP = "quantize"
DEVICE, DTYPE, CALLS = ("cuda", torch.bfloat16, 10) if torch.cuda.is_available() else ("cpu", torch.float32, 1)
# name: (M tokens, K width)
SHAPES = (
    {"B/16": (256 * 197, 768), "L/14": (128 * 257, 1024), "g/14": (64 * 257, 1536)}
    if DEVICE == "cuda"
    else {"tiny": (4 * 197, 192)}
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


VARIANTS = ["copy", "ours", "eager"] + (["compiled"] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize(benchmark, shape, name):
    M, K = SHAPES[shape]
    x = torch.randn(M, K, device=DEVICE).to(DTYPE)
    num_bytes = M * K * (x.element_size() + 1) + 4 * M
    compiled = torch.compile(quantize_reference) if name == "compiled" else None
    way = {"ours": quantize, "eager": quantize_reference, "compiled": compiled, "copy": None}[name]
    if way is not None:
        back, scale = dequantize(*way(x)), x.float().abs().amax(1, keepdim=True) / 448
        assert ((back - x).abs() <= (x.float().abs() / 16).maximum(scale * 2**-10) * 1.001).all(), f"{name} is wrong"
    call = copy_of(num_bytes) if way is None else lambda: way(x)
    measure(benchmark, call, f"quantize {shape}", num_bytes)
