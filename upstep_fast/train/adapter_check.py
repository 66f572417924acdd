"""Sanity checks of a trained adapter: it received gradients, moved, is finite and changes the features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from upstep_fast.errors import CheckFailedError
from upstep_fast.model import lora, pooling
from upstep_fast.runtime.device import Compute
from upstep_fast.train.state import RunState


@torch.no_grad()
def check_adapter(state: RunState, images: Tensor, compute: Compute, out: Path) -> None:
    """Raise CheckFailedError unless every adapter got a gradient, moved, is finite, and changes the features.

    images: [B, C, H, W], normalized; the first 32 are used.
    """
    method = state.method
    for name, got in zip(method.must_receive_grad(), state.got_grad.tolist(), strict=True):
        if not got:
            raise CheckFailedError(
                f"adapter: {name} never received a gradient; the adapter in {out} is kept for inspection"
            )
    for name, adapter in method.adapters.items():
        for part, b in zip(adapter.parts, adapter.lora_b, strict=True):
            if not b.any():
                raise CheckFailedError(f"adapter: lora_B of {name}, part {part}, is all zero after training; see {out}")
            if not b.isfinite().all():
                raise CheckFailedError(f"adapter: lora_B of {name}, part {part}, is not finite; see {out}")
    if not method.adapters:  # fully trained: there is no base model left to compare with
        return
    with compute.autocast():
        adapted = pooling.features(method.vit, images[:32])
        with lora.disabled(method.adapters.values()):
            base = pooling.features(method.vit, images[:32])
    if torch.equal(adapted, base):
        raise CheckFailedError(f"adapter: features with and without it are the same; the adapter in {out} does nothing")
