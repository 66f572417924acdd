"""Launches of low_rank_mixer that tests/kernels/test_aot.py compiles."""

from __future__ import annotations

import torch

from upstep_fast.kernels.low_rank_mixer.args import MixerArgs
from upstep_fast.kernels.low_rank_mixer.triton import backward, forward

AXES = {"C": ("channel",), "CT": ("channel", "token")}


def _case(launch, order, dtype, rank=16, tokens=197, width=768, combine="sum", scaled=False):
    def run(capability):
        axes = AXES[order]
        b = torch.empty(128, tokens, width, dtype=dtype, device="meta")
        wide = b.new_empty(1, dtype=torch.float32)[0]
        lengths = [width if axis == "channel" else tokens for axis in axes]
        factors = [wide.new_empty(shape) for n in lengths for shape in ((rank, n), (rank,), (n, rank), (n,))]
        gate, scale = wide if combine == "gated" else None, wide if scaled else None
        args = MixerArgs(axes, combine, 1, gate, scale, factors)
        if launch is forward:
            return forward(b, b, args)
        lows = [b.new_empty((128, tokens, rank) if axis == "channel" else (128, rank, width)) for axis in axes]
        return backward(b, b, b, lows, args, True)

    return run


HALF = torch.bfloat16
CASES = {
    "forward bf16 CT": _case(forward, "CT", HALF),
    "backward bf16 CT": _case(backward, "CT", HALF),
}
OTHERS = ((1, 65, 200, "replace", True), (16, 257, 1024, "sum", False), (32, 257, 1792, "gated", True))
LONG = {
    f"{name} {order} {dtype} rank {rank}": _case(launch, order, dtype, rank, tokens, width, combine, scaled)
    for name, launch in (("forward", forward), ("backward", backward))
    for order in AXES
    for dtype in (torch.float16, HALF, torch.float32)
    for rank, tokens, width, combine, scaled in OTHERS
}
