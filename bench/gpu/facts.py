"""Facts of the first run on a GPU: machine, check of one op, tests, benchmark of one op; printed as lines of JSON.

python bench/gpu/facts.py machine DEVICE
python bench/gpu/facts.py check OP DEVICE [IMPLEMENTATION]
python bench/gpu/facts.py tests OUT PYTEST-ARGUMENTS...
python bench/gpu/facts.py bench FILE SHAPE
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from first import FACT


def emit(**fact: Any) -> None:
    """Print one fact for the run that started this process."""
    print(FACT + json.dumps(fact), flush=True)


def machine(device: str) -> int:
    """Emit versions, and the ceilings of this machine: bytes of a copy and operations of a product per second."""
    import torch

    from upstep_fast.runtime.device import resolve
    from upstep_fast.runtime.duration import product_rate
    from upstep_fast.runtime.machine import device_card
    from upstep_fast.runtime.timing import alternate

    emit(card=device_card(torch.device(device)))
    source = torch.empty(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, source.device, runs=10)["copy"]
    emit(ceiling="copy", gigabytes_per_s=2 * source.numel() / sorted(times)[5] / 1e6)
    emit(ceiling="product", teraflops=product_rate(resolve(device, "auto")) / 1e12)
    return 0


def check(op: str, device: str, implementation: str | None = None) -> int:
    """Emit the outcome of every implementation and dtype of one op against its float64 reference."""
    import torch

    from upstep_fast.kernels import _dispatch
    from upstep_fast.kernels._self_check import check as check_op

    outcomes = []
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        for name in (implementation,) if implementation else (None, *_dispatch.IMPLEMENTATIONS):
            outcome, choices = check_op(op, torch.device(device), dtype, name)
            ran = sorted({choice.implementation for choice in choices})
            # an op without this implementation has run as it does when nothing is forced
            if outcome.passed is None or name is None or name in ran:
                outcomes.append(outcome)
                emit(ran=ran, **asdict(outcome))
    return int(any(outcome.passed is False for outcome in outcomes))


def tests(out: str, *arguments: str) -> int:
    """Run pytest and emit one fact for each failed test and their numbers; a kill leaves those that came before."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    assert process.stdout is not None
    with Path(out, "gpu_first_tests.log").open("w") as log:
        for line in process.stdout:
            log.write(line)
            words = line.split()
            if found := next((word for word in words if word in counts), None):
                # "tests/x.py::test_y FAILED [ 10%]", or with xdist "[gw0] [ 10%] FAILED tests/x.py::test_y"
                name = next((word for word in words if "::" in word), "")
                if line.startswith(("FAILED", "ERROR")):
                    continue  # of the summary at the end
                counts[found] += 1
                if found in ("FAILED", "ERROR"):
                    emit(test=name, outcome=found.lower())
    code = process.wait()
    emit(tests=counts)
    return 0 if code in (0, 5) else 1  # 5: no test was selected


class Benchmarks:
    """A plugin of pytest: emit each benchmark as it ends, so that a kill leaves those before it.

    Medians in ms a call, beside the bytes that a call must move.
    """

    def pytest_runtest_logfinish(self) -> None:
        for done in self.benchmarks[self.emitted :]:
            print()  # after pytest's dot
            info, calls = done.extra_info, done.extra_info.get("calls", 1)
            emit(
                group=done.group,
                variant=str((done.params or {}).get("name", done.name)),
                median_ms=1e3 * done.stats.median / calls,
                iqr_ms=1e3 * done.stats.iqr / calls,
                bytes=info.get("bytes"),
                ran=info.get("ran"),
            )
        self.emitted = len(self.benchmarks)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.benchmarks: list[Any] = session.config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        self.emitted = 0


def bench(file: str, shape: str) -> int:
    """Run the benchmarks of one op at one shape and emit each of them."""
    arguments = ["-q", "-s", file, "-k", shape, "--benchmark-only", "-p", "no:cacheprovider"]
    return int(pytest.main(arguments, plugins=[Benchmarks()]) not in (0, 5))  # 5: none at this shape


KINDS: dict[str, Callable[..., int]] = {"machine": machine, "check": check, "tests": tests, "bench": bench}

if __name__ == "__main__":
    raise SystemExit(KINDS[sys.argv[1]](*sys.argv[2:]))
