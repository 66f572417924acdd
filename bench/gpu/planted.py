"""Check of an op with a planted fault, for the rehearsal: the run has to survive it, and to name it.

python bench/gpu/planted.py hang|crash|wrong|package
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock


def hang(_: Any) -> None:
    """Wait for ever, as for a grid barrier that not all programs reach; no Python runs meanwhile."""
    while True:
        time.sleep(3600)


def crash(_: Any) -> None:
    """Die as a process does when the watchdog of a lost GPU aborts it."""
    os.abort()


def wrong(out: Any) -> Any:
    """Return a result that is 2 % off, more than any dtype's limit."""
    return 1.02 * out


FAULTS: dict[str, Callable[[Any], Any]] = {"hang": hang, "crash": crash, "wrong": wrong}


def main(kind: str) -> int:
    """Check gelu as the first run does, with the fault in its result; package: import what is not installed."""
    if kind == "package":
        __import__("no_such_package")
    import facts

    from upstep_fast.kernels import _self_check

    intact = _self_check.sample_inputs

    def planted(name: str) -> Any:
        sample = intact(name)
        return replace(sample, call=lambda *tensors: FAULTS[kind](sample.call(*tensors)))

    with mock.patch.object(_self_check, "sample_inputs", planted):
        return facts.check("gelu", "cpu", "reference")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
