"""Counts of the sweeps for docs/reliability.md: one JSON line per call, read by bench/reliability/figures.py."""

from __future__ import annotations

import json
import os


def tally(area: str, kind: str, tried: int, wrong: int = 0, tracebacks: int = 0) -> None:
    """Append a sweep's counts to the file that UPSTEP_FAST_TALLY names; without that variable nothing happens.

    area: a row of the table in docs/reliability.md, such as "pixel kinds", "PEFT options", "command line", "kill
    points" or "hostile files". kind: what varied in this call, counted once however often it is tallied. tried: inputs.
    wrong: wrong results in silence. tracebacks: errors that are not the package's own, and hangs.
    """
    if path := os.environ.get("UPSTEP_FAST_TALLY"):
        with open(path, "a") as file:
            file.write(json.dumps(dict(area=area, kind=kind, tried=tried, wrong=wrong, tracebacks=tracebacks)) + "\n")
