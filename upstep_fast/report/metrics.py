"""Metrics of each step: metrics.jsonl, and the trackers that a run logs to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from upstep_fast.report.logs import log, steps_log
from upstep_fast.report.trackers import Sender, TrackedRun, Values

steps_log.propagate = False
MAX_ROW_BYTES = 1 << 20  # a longer line is none of ours


class Metrics:
    """Writer of metrics.jsonl, one object per step; numbers that are not finite are written as null.

    step: of the first row to write. Rows of earlier steps are kept; rows that a killed run wrote after its last
    checkpoint are cut off.
    log_to: names of trackers that every number is sent to as well. config: what they show of the run, by flag.
    """

    def __init__(self, path: Path, step: int = 0, log_to: Sequence[str] = (), config: Mapping[str, Any] | None = None):
        # unbuffered: a killed run loses no line, and a full disk raises where the line is written
        self._file = path.open("r+b" if step and path.exists() else "wb", buffering=0)
        self._file.truncate(_bytes_of_rows(path, step))
        self._file.seek(0, os.SEEK_END)
        run = TrackedRun(path.parent, step, config or {})
        self._trackers = [Sender(name, run) for name in log_to]

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl without buffering. Raises OSError."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        left = memoryview((json.dumps(clean) + "\n").encode())
        while left:
            left = left[self._file.write(left) :]
        if self._trackers:
            numbers = {k: float(v) for k, v in clean.items() if k != "step" and isinstance(v, (int, float))}
            for tracker in self._trackers:
                tracker.log(row["step"], numbers)

    def conclude(self, step: int, values: Values) -> None:
        """Send the result of the run to the trackers; numbers that are not finite are left out."""
        known = {k: v for k, v in values.items() if isinstance(v, str) or math.isfinite(v)}
        for tracker in self._trackers:
            tracker.conclude(step, known)

    def sync(self) -> None:
        """Flush the rows to disk (fsync). Raises OSError."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close(error)


def _bytes_of_rows(path: Path, steps: int) -> int:
    kept = 0
    with path.open("rb") as file:
        for row in range(steps):
            line = file.readline(MAX_ROW_BYTES)
            if not _is_row(line, row):
                log.warning("metrics: %s lacks the rows of steps %d to %d", path, row, steps - 1)
                break
            kept += len(line)
    return kept


def _is_row(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] == step
    except (ValueError, KeyError, TypeError):
        return False
