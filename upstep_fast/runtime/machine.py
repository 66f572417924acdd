"""Facts about this machine: processor, free and peak memory, number of workers, package versions."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from upstep_fast.runtime import distributed

CGROUP = Path("/sys/fs/cgroup")
CGROUP_FILES = (  # (limit, usage) in bytes, of cgroup v2 and v1
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def default_workers() -> int:
    """Return one thread per core, at most 16; processes on one machine share its cores."""
    return max(1, min(16, (os.cpu_count() or 1) // distributed.local_size()))


def num_workers(requested: int | None) -> int:
    """Return the number of decoding threads: `requested`, or `default_workers` for None."""
    return default_workers() if requested is None else requested


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on `device`; None where the system does not report them.

    On a GPU the caching allocator's unused blocks count as free; on a CPU the limits of cgroups apply.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    candidates = [_free_host_bytes(Path("/proc/meminfo"))]
    for limit, usage in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            candidates.append(int((CGROUP / limit).read_text()) - int((CGROUP / usage).read_text()))
    return min((value for value in candidates if value is not None), default=None)


def spare_bytes() -> float:
    """Return the free main memory beyond what this process takes again when it is at its peak; inf if unknown."""
    free = free_bytes(torch.device("cpu"))
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return math.inf
    return math.inf if free is None else free - max(0, peak_bytes(torch.device("cpu")) - resident)


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def extra_peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Call `run` and return the GPU allocator's peak beyond what was allocated before; None (no call) on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    allocated = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return peak_bytes(device) - allocated


def format_bytes(size: float) -> str:
    """Return a number of bytes in GB (1e9), below 0.1 GB in MB (1e6)."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def device_card(device: torch.device) -> dict[str, Any]:
    """Return the facts that a measurement must be quoted with: processor, threads, versions and GPU."""
    card: dict[str, Any] = {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "upstep_fast": package_version("upstep_fast"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return card


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _free_host_bytes(meminfo: Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in getattr(os, "sysconf_names", {}) else None
