"""Measurement of real steps on this machine: the allocator's peak, and the seconds of forward and backward."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.duration import now
from upstep_fast.train.state import fresh_state
from upstep_fast.train.step import forward_loss
from upstep_fast.train.update import update

CPU_IMAGES = 8  # of a measured step on a CPU, where a full batch may take minutes
_COUNTED = "upstep_fast: the counted step"


@dataclass(frozen=True)
class Measured:
    """One real update step with random weights and images."""

    batch: int
    peak_bytes: int  # model, optimizer and views included
    forward_seconds: float
    backward_seconds: float  # the update included


def measure(config: AdaptConfig, compute: Compute, *, cpu_images: int = CPU_IMAGES) -> Measured:
    """Take three update steps: the second's memory is counted, the third is timed. On a CPU of at most `cpu_images`."""
    on_cpu = compute.device.type == "cpu"
    if on_cpu:
        config = replace_flat(config, batch_size=min(config.optimization.batch_size, cpu_images))
    with _peak_of_cpu() if on_cpu else contextlib.nullcontext([0]) as peak:
        take_step, seconds = one_step(config, compute)
        take_step()
        if not on_cpu:
            torch.cuda.synchronize(compute.device)
            torch.cuda.reset_peak_memory_stats(compute.device)
        with record_function(_COUNTED):
            take_step()
    if not on_cpu:
        peak = [torch.cuda.max_memory_allocated(compute.device)]
    seconds.clear()
    take_step()
    return Measured(config.optimization.batch_size, peak[0], seconds[0], seconds[1])


def one_step(config: AdaptConfig, compute: Compute) -> tuple[Callable[[], None], list[float]]:
    """Return a function that takes an update step, views included, and the list of seconds that it appends to.

    Each call appends two times: forward with the loss, and backward with the update. Weights and images are random.
    """
    config = replace_flat(config, accumulate=1, view_uses=1)  # each step updates, and makes its views
    backbone = backbones.load_from(config.model, pretrained=False)
    state = fresh_state(config, compute, backbone)
    image = torch.randint(256, (len(backbone.mean), *backbone.img_size), dtype=torch.uint8)
    numbers = torch.arange(config.optimization.batch_size) % config.objective.prototypes  # classes, for DIET
    batch = Batch([image] * len(numbers), numbers, 0, 0)
    seconds: list[float] = []

    def take_step() -> None:
        views = state.method.views(batch, compute.device)
        began = now(compute)
        with compute.autocast():
            loss = forward_loss(state.method, views, config)
        middle = now(compute)
        update(loss, state, config)
        seconds.extend((middle - began, now(compute) - middle))

    return take_step, seconds


@contextlib.contextmanager
def _peak_of_cpu() -> Iterator[list[int]]:
    """Yield a list that holds, after the context, the most bytes that were allocated at once in the counted step.

    The allocator reports its total since the profiler began, so everything must be allocated within the context.
    """
    peak: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield peak
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    span = next(e for e in events if e.get("name") == _COUNTED and e.get("ph") == "X")
    memory = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]"]
    # the allocator's total continues from an earlier profile of this process
    start = memory[0][1]["Total Allocated"] - memory[0][1]["Bytes"]
    totals = [args["Total Allocated"] for at, args in memory if span["ts"] <= at <= span["ts"] + span["dur"]]
    peak.append(max(totals) - start)
