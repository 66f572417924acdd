"""low_rank_mixer: one adaptor of LoSA, forward and backward: plain products, eager, torch.compile and a copy.

    pytest bench/kernels/bench_low_rank_mixer.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls. `bytes` is what an
adaptor has to move whatever its form (b, a, u, out; g, u, da, and the norms' second reads), and the copy moves as many.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from upstep_fast.kernels.low_rank_mixer import low_rank_mixer, low_rank_mixer_reference

DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
# name: (P images, N tokens, D width, rank of both axes)
SHAPES = (
    {
        "B/16 r4": (256, 197, 768, 4), "B/16 r16": (256, 197, 768, 16), "B/16 r32": (256, 197, 768, 32),
        "L/14 r16": (128, 257, 1024, 16), "e/14 r16": (32, 257, 1792, 16),
    }
    if DEVICE == "cuda"
    else {"tiny r4": (4, 65, 192, 4)}
)  # fmt: skip
AXES = ("channel", "token")
PASSES = {"forward": 6, "both": 12}
VARIANTS = ["copy", "reference", "eager"] + (["compiled"] if DEVICE == "cuda" else [])


def eager(b, a, axes, factors):
    """Compute the adaptor as one would write it, in the type of b."""
    u = x = b + a
    for i, axis in enumerate(axes):
        down, down_bias, up, up_bias = (t.to(b.dtype) for t in factors[4 * i : 4 * i + 4])
        x_hat = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        x_hat = x_hat if axis == "channel" else x_hat.mT
        change = F.linear(F.gelu(F.linear(x_hat, down, down_bias)), up, up_bias)
        x = x + (change if axis == "channel" else change.mT)
    return a + (x - u)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_adaptor(measure, copy_of, shape, direction, name):
    P, N, D, rank = SHAPES[shape]
    torch.manual_seed(0)
    b, a, grad = (torch.randn(P, N, D, device=DEVICE).to(DTYPE) for _ in range(3))
    lengths = [D if axis == "channel" else N for axis in AXES]
    factors = [
        0.1 * torch.randn(size, device=DEVICE) for n in lengths for size in ((rank, n), (rank,), (n, rank), (n,))
    ]
    for leaf in (a, *factors):
        leaf.requires_grad_()
    num_bytes = PASSES[direction] * b.numel() * b.element_size()
    function = {"eager": eager, "compiled": torch.compile(eager)}.get(name, low_rank_mixer)

    def forward(b, a):
        with torch.no_grad():
            return function(b, a, AXES, factors)

    def both(b, a, grad):
        return torch.autograd.grad(function(b, a, AXES, factors), [a, *factors], grad)

    if name == "copy":
        call = copy_of(num_bytes)
    else:
        call = (lambda: forward(b, a)) if direction == "forward" else lambda: both(b, a, grad)
        wide = [f.detach().double().requires_grad_() for f in factors]
        few_b, few_a, few_grad = (t[:2].detach().clone() for t in (b, a, grad))
        wide_a = few_a.double().requires_grad_()
        want = low_rank_mixer_reference(few_b.double(), wide_a, AXES, wide)
        pairs = [(forward(few_b, few_a), want)]
        if direction == "both":
            ours = both(few_b, few_a.requires_grad_(), few_grad)
            theirs = torch.autograd.grad(want, [wide_a, *wide], few_grad.double())
            pairs += zip(ours, theirs, strict=True)
        limit = 8 * torch.finfo(DTYPE).eps
        for g, w in pairs:
            assert (g.double() - w).norm() <= limit * w.norm(), f"{name} is wrong"

    measure(call, f"low_rank_mixer {direction} {shape}", "low_rank_mixer", bytes=num_bytes, dtype=str(DTYPE))
