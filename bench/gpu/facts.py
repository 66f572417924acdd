"""Facts of the first run on a GPU: machine, check of one op, tests, benchmark of one op; printed as lines of JSON.

python bench/gpu/facts.py machine DEVICE
python bench/gpu/facts.py check OP DEVICE [IMPLEMENTATION]
python bench/gpu/facts.py tests OUT PYTEST-ARGUMENTS...
python bench/gpu/facts.py bench FILE SHAPE OUT
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def bench(file: str, shape: str, out: str) -> int:
    """Run the benchmarks of one op at one shape; emit medians [ms a call], with the copy of as many bytes as floor."""
    report = Path(out, f".bench-{Path(file).stem}.json")
    command = [sys.executable, "-m", "pytest", "-q", file, "-k", shape, "--benchmark-only", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, f"--benchmark-json={report}"], stdout=sys.stdout, stderr=subprocess.STDOUT)
    if report.exists() and report.stat().st_size:
        for row in json.loads(report.read_text())["benchmarks"]:
            info = row["extra_info"]
            emit(
                group=row["group"],
                variant=str((row.get("params") or {}).get("name", row["name"])),
                median_ms=1e3 * row["stats"]["median"] / info.get("calls", 1),
                iqr_ms=1e3 * row["stats"]["iqr"] / info.get("calls", 1),
                bytes=info.get("bytes"),
                ran=info.get("ran"),
            )
        report.unlink()
    return int(result.returncode not in (0, 5))


KINDS: dict[str, Callable[..., int]] = {"machine": machine, "check": check, "tests": tests, "bench": bench}

if __name__ == "__main__":
    raise SystemExit(KINDS[sys.argv[1]](*sys.argv[2:]))
