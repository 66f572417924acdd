"""Progress line of a run."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from types import TracebackType
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.gate import GateState
from upstep_fast.report.logs import steps_log
from upstep_fast.runtime import progress, terminal


class Progress:
    """Progress line: step, images/s, loss, center length, skipped steps, time spent waiting for data, time left.

    A bar on a terminal, a line every `log_every` steps otherwise, and when nothing was printed for a few seconds; with
    --quiet the lines go to train.log only.
    """

    def __init__(self, config: AdaptConfig, state: GateState, device: str = ""):
        run = config.optimization
        self._steps, self._every, self._batch = run.num_steps, config.output.log_every, run.batch_size
        self._start, self._waited, self._loss = time.monotonic(), 0.0, math.nan
        self._first, self._device = state.step, device
        self._stack = contextlib.ExitStack()

    def update(self, row: dict[str, Any], state: GateState) -> None:
        """Show one row of metrics."""
        self._task.advance()
        done = self._task.done
        self._waited += row["data_wait"]
        self._loss = row["loss"] if row["loss"] is not None else self._loss
        seconds = max(1e-9, time.monotonic() - self._start)
        rate = (done - self._first) * self._batch / seconds
        skipped, waited = 1 - state.num_updates / state.step, self._waited / seconds
        loss = "-" if math.isnan(self._loss) else f"{self._loss:.3f}"  # until the first step with an update
        center = "-" if row["center"] is None else f"{row['center']:.3f}"
        self._task.note = (
            f"{rate:,.0f} images/s  loss {loss}  center {center}  "
            f"skipped {100 * skipped:.0f} %  data wait {100 * waited:.0f} %"
        )
        if done % self._every == 0 or done == self._steps:
            line = self._line((self._task.seconds_per_unit or 0.0) * (self._steps - done))
            steps_log.info("%s", line)
            if terminal.is_plain(stderr=True) and not terminal.is_quiet():
                print(line, file=sys.stderr, flush=True)
                progress.printed()

    def set_end(self, num_steps: int) -> None:
        """Set the number of steps of the run."""
        self._steps = self._task.total = num_steps

    def _line(self, left: float) -> str:
        return f"step {self._task.done}/{self._steps}  {self._task.note}  left {terminal.format_duration(left)}"

    def __enter__(self) -> Progress:
        shown = progress.track("adapt", self._steps, "steps", self._first, self._device)
        self._task = self._stack.enter_context(shown)
        self._task.plain = self._line  # the same line between two of `log_every` steps as at them
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
