"""Interleaved timing of variants."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from upstep_fast.runtime.progress import track


@dataclass(frozen=True)
class Timing:
    """Timing of one variant: milliseconds per run, and the peak memory beyond what was allocated before (GPU only)."""

    name: str
    median_ms: float
    low_ms: float  # first quartile
    high_ms: float  # third quartile
    runs: int
    peak_bytes: int | None
    error: float  # of its results, relative to fp32


def alternate(
    variants: Mapping[str, Callable[[], object]], device: torch.device, *, runs: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Return the milliseconds of each run of each variant. The variants take turns: drift affects all alike."""
    for _ in range(warmup):
        for run in variants.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    with track("timing", runs * len(variants), "runs") as task:
        for _ in range(runs):
            for name, run in variants.items():
                times[name].append(_milliseconds(run, device))
                task.advance()
    return times


def summarize(name: str, times: list[float], peak: int | None, error: float) -> Timing:
    """Return the quartiles of `times` [ms]. peak: bytes; error: of the results, relative to fp32."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Timing(name, median, low, high, len(times), peak, error)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    if device.type == "mps":
        began = time.perf_counter()
        run()
        torch.mps.synchronize()
        return 1e3 * (time.perf_counter() - began)
    # with one thread the process's CPU time excludes the work of other processes
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start_s = clock()
    run()
    return 1e3 * (clock() - start_s)
