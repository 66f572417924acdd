"""Report of what runs on this machine, and why: `python -m upstep_fast.kernels [--device cpu|cuda]`.

Each op runs once on sample inputs and is compared with its reference. Exit code 1: an op failed.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence

import torch

from . import _triton
from ._dispatch import Choice, requested
from ._native import LIBRARY, extension, has_cuda, library_folder, load_failure
from ._sample_inputs import SAMPLE_INPUTS
from ._self_check import check


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


def _print(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description="What runs on this machine, and why.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run the ops")
    device = torch.device(parser.parse_args(arguments).device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    choices: list[Choice] = []
    failed: list[tuple[str, ...]] = []
    for name in SAMPLE_INPUTS:
        outcome, ran = check(name, device, dtype)
        choices += [choice for choice in ran if choice not in choices]
        if not outcome.passed:
            error = f"errors {outcome.forward}, {outcome.backward} above {outcome.limit}"
            failed.append((name, device.type, "FAILED", outcome.note or error))
    _print(_machine())
    print()
    choices.sort(key=lambda choice: (choice.op, choice.device))
    rows = [(choice.op, choice.device, choice.implementation, choice.reason) for choice in choices]
    _print([("op", "device", "runs", "why"), *rows, *failed])
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
