"""What runs on this machine, and why: `python -m upstep_fast.kernels [--device cpu|cuda]`.

Each op is called once on a small problem, so that what it says is what it did. Exit code 1: an op failed.
"""

from __future__ import annotations

import argparse
import platform

import torch

from . import _triton
from ._dispatch import report, requested
from ._native import LIBRARY, extension, has_cuda, library_folder, load_failure
from ._sample_inputs import SAMPLE_INPUTS, sample_inputs


def _machine() -> list[tuple[str, str]]:
    rows = [
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _triton.MISSING or f"{_triton.triton.__version__}" + " (interpreter)" * _triton.INTERPRET),
    ]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        rows.append(("GPU", f"{properties.name}, sm_{properties.major}{properties.minor}"))
    else:
        rows.append(("GPU", "none that torch can use"))
    failure = load_failure()
    rows.append(("compiled ops", failure or f"{library_folder()}/{LIBRARY}: CPU{' and CUDA' * has_cuda()}"))
    try:
        rows.append(("build", ", ".join(f"{k} {v or 'none'}" for k, v in extension().BUILD_INFO.items())))
    except RuntimeError as error:
        rows.append(("build", str(error)))
    return [*rows, ("requested", requested() or "nothing: each op chooses (UPSTEP_FAST_KERNELS names one)")]


def _print(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="What runs on this machine, and why.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to try the ops")
    device = torch.device(parser.parse_args(arguments).device)
    failed: list[tuple[str, ...]] = []
    for name in SAMPLE_INPUTS:
        try:
            problem = sample_inputs(name)
            problem.call(*problem.on(device, torch.bfloat16 if device.type == "cuda" else torch.float32))
        except Exception as error:  # a report must say what is broken, whatever it is
            failed.append((name, device.type, "FAILED", str(error).split("\n")[0]))
    _print(_machine())
    print()
    _print(
        [("op", "device", "runs", "why"), *((c.op, c.device, c.implementation, c.reason) for c in report()), *failed]
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
