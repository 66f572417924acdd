"""Progress line of a run."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.gate import GateState
from upstep_fast.report.logs import steps_log
from upstep_fast.runtime import terminal


class Progress:
    """Progress line: step, images/s, loss, center length, skipped steps, time spent waiting for data, time left.

    A bar on a terminal, a line every `log_every` steps otherwise; with --quiet the lines go to train.log only.
    """

    def __init__(self, config: AdaptConfig, state: GateState):
        run = config.optimization
        self._steps, self._every, self._batch = run.num_steps, config.output.log_every, run.batch_size
        self._start, self._waited, self._loss = time.monotonic(), 0.0, math.nan
        self._first = self._done = state.step
        self._task: TaskID | None = None
        columns = (
            TextColumn("adapt"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._plain, self._quiet = terminal.is_plain(stderr=True), terminal.is_quiet()
        self._bar = Bar(*columns, console=terminal.console(stderr=True), disable=self._plain or self._quiet)

    def update(self, row: dict[str, Any], state: GateState) -> None:
        """Show one row of metrics."""
        self._done += 1
        self._waited += row["data_wait"]
        self._loss = row["loss"] if row["loss"] is not None else self._loss
        seconds = max(1e-9, time.monotonic() - self._start)
        rate = (self._done - self._first) * self._batch / seconds
        skipped, waited = 1 - state.num_updates / state.step, self._waited / seconds
        loss = "-" if math.isnan(self._loss) else f"{self._loss:.3f}"  # until the first step with an update
        text = (
            f"{rate:,.0f} images/s  loss {loss}  center {row['center']:.3f}  "
            f"skipped {100 * skipped:.0f} %  data wait {100 * waited:.0f} %"
        )
        assert self._task is not None
        self._bar.update(self._task, advance=1, description=text)
        if self._done % self._every == 0 or self._done == self._steps:
            left = seconds / (self._done - self._first) * (self._steps - self._done)
            line = f"step {self._done}/{self._steps}  {text}  left {terminal.format_duration(left)}"
            steps_log.info("%s", line)
            if self._plain and not self._quiet:
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps, completed=self._first)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
