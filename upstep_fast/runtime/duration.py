"""Rough time of work, told before its first step.

    seconds = FLOPs / (EFFICIENCY x FLOP/s of a large matrix product)

The progress (progress.py) measures the time too, after a few steps; those of a large model on a CPU may take an hour
each. On a GPU they do not, and the reading of images often takes longer than the model, so nothing is told before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.terminal import format_duration

log = logging.getLogger("upstep_fast")

# share of a large product's rate that a whole step reaches: 392 of 790 TFLOP/s for ViT-L/14 on an H200
EFFICIENCY = 0.5
HOUR = 3600
MIN_FLOPS = 1e12  # what is below takes seconds on any CPU: its speed is not looked at


def log_estimate(flops: float, compute: Compute, shorter: Callable[[float], str], of: str = "") -> None:
    """Log the time of work on a CPU; more than an hour is a warning.

    shorter: from the seconds to what would take less time, as a list in words. of: what the time is of, " for ...".
    """
    if compute.device.type != "cpu" or flops < MIN_FLOPS:
        return
    seconds = flops / (EFFICIENCY * product_rate(compute))
    text = f"time: roughly {format_duration(seconds)} on this CPU{of}"
    if seconds > HOUR:
        log.warning("%s; less: %s", text, shorter(seconds))
    else:
        log.info("%s", text)


def product_rate(compute: Compute, width: int = 1024) -> float:
    """Return the FLOP/s of a large matrix product in the run's precision, the median of five."""
    rows = 16384 if compute.device.type == "cuda" else 512
    dtype = compute.dtype or torch.float32
    a, b = (torch.randn(*shape, device=compute.device).to(dtype) for shape in ((rows, width), (width, 4 * width)))
    seconds = []
    for _ in range(6):
        began = now(compute)
        a @ b
        seconds.append(now(compute) - began)
    return 2 * rows * width * 4 * width / sorted(seconds[1:])[2]


def now(compute: Compute) -> float:
    """Return the time in seconds once the device has done its work."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize(compute.device)
    if compute.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
