"""Fixtures that time the kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from upstep_fast.kernels import _dispatch

ON_GPU = torch.cuda.is_available()
CALLS = 20 if ON_GPU else 1  # of a round


@pytest.fixture
def measure(benchmark) -> Callable[..., None]:
    """Time rounds of calls of an op: `measure(call, group, op, **info)`; record the implementation that ran and `info`.

    info: `bytes` is what the op has to move, to be held against the time of the `copy` of its group.
    """

    def timed(call: Callable[[], object], group: str, op: str, **info: object) -> None:
        def calls() -> None:
            for _ in range(CALLS):
                call()
            if ON_GPU:
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.extra_info |= info | {
            "calls": CALLS, "device": torch.cuda.get_device_name() if ON_GPU else "cpu", "torch": torch.__version__,
            "ran": {c.op: c.implementation for c in _dispatch.report() if c.op.startswith(op)},
        }  # fmt: skip
        benchmark.pedantic(calls, warmup_rounds=3, rounds=20)

    return timed


@pytest.fixture
def copy_of() -> Callable[[int], Callable[[], object]]:
    """Make a copy that moves `bytes` in all, half in and half out, as the speed of memory: `copy_of(bytes)`."""

    def copy(num_bytes: int) -> Callable[[], object]:
        source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda" if ON_GPU else "cpu")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return copy
