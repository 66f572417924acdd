"""What a call would launch on a GPU that is not here: kernels, arguments and grids, compiled and not run.

For tests/kernels/test_aot.py and bench/kernels/static.py. A call takes tensors on the meta device.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton

from upstep_fast.kernels import __name__ as KERNELS
from upstep_fast.kernels._tile_sizes import TILES

runtime = importlib.import_module("triton.runtime.driver").driver
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
# what launchers ask of a device, as multiples of its number of multiprocessors
ASKED = {"_num_programs": 1, "_processors": 1, "_resident_warps": 16}

Capability = tuple[int, int]
Case = Callable[[Capability], object]


class Launch(NamedTuple):
    """One launch: the function, what it compiled to (None: not compiled), its arguments by name, its grid."""

    function: Any
    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, int, int]


def launches(
    case: Case, capability: Capability, *, compiles: bool = True, processors: int | None = None
) -> list[Launch]:
    """Return every launch that `case` makes for a GPU of `capability`; processors: as many as the GPU has.

    Raises AssertionError for a grid that cannot be launched, and for a launch that leaves the contraction of a * b + c
    to Triton's default, which changes.
    """
    found = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        assert kwargs.get("enable_fp_fusion") is True, f"{self.fn.__name__}: launched without enable_fp_fusion"
        assert all(size < 2**16 for size in grid[1:]), f"{self.fn.__name__}: a grid of {grid} cannot be launched"
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs) if compiles else None
        names = dict(zip(self.arg_names, args, strict=False))
        found.append(Launch(self, kernel, names | kwargs, (*grid, 1, 1)[:3]))

    with contextlib.ExitStack() as stack:
        of_this = {op: {None: rows.get(capability, rows[None])} for op, rows in TILES.items()}
        stack.enter_context(mock.patch.dict(TILES, of_this))
        stack.enter_context(mock.patch.object(triton.JITFunction, "run", compile_only))
        stack.enter_context(pretending(capability))
        for module in [m for name, m in sys.modules.items() if name.startswith(KERNELS) and processors]:
            for name in ASKED.keys() & vars(module).keys():
                number = ASKED[name] * (processors or 0)
                stack.enter_context(mock.patch.object(module, name, lambda device, number=number: number))
        case(capability)
    return found


@contextlib.contextmanager
def pretending(capability: Capability) -> Iterator[None]:
    """Triton sees a device of `capability`; each has its own number, so Triton's caches keep them apart."""
    from triton.backends.compiler import GPUTarget

    sm = 10 * capability[0] + capability[1]
    driver = SimpleNamespace(
        get_current_device=lambda: sm,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
    )
    before, runtime._active = runtime._active, driver
    try:
        yield
    finally:
        runtime._active = before


def resources(cubin: Path) -> dict[str, int]:
    """Return REG, STACK and LOCAL of a compiled kernel: registers a thread, and bytes of memory that it spills to."""
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", cubin))}


def cuobjdump(option: str, cubin: Path) -> str:
    """Return what NVIDIA's cuobjdump, which comes with Triton, prints."""
    command = [str(BINARIES / "cuobjdump"), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
