"""What a run says while it runs: messages, metrics.jsonl, TensorBoard's events and one progress line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.errors import Interrupted, UpstepError
from upstep_fast.methods.gate import GateState
from upstep_fast.runtime import distributed, terminal

log = logging.getLogger("upstep_fast")
# the progress lines in train.log; on the console they have a form of their own
steps_log = logging.getLogger("upstep_fast.steps")
steps_log.propagate = False


def setup_logging(debug: bool = False) -> None:
    """Messages of this package go to stderr: plain lines to a pipe, coloured ones to a terminal."""
    handler: logging.Handler
    if terminal.is_plain(stderr=True):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    else:
        console = terminal.console(stderr=True)
        handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    # on the handler: train.log gets everything
    handler.setLevel(logging.WARNING if terminal.is_quiet() else logging.NOTSET)
    if not distributed.is_first():  # what all ranks say is said once
        handler.setLevel(logging.CRITICAL)
    logger = logging.getLogger("upstep_fast")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def train_log(path: Path) -> Iterator[None]:
    """Within this context messages go to the end of `path` too, and so does the error that ends it."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # on a full disk the log falls behind; what must be there, the metrics, says so
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    steps_log.addHandler(handler)
    steps_log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        level = logging.WARNING if isinstance(error, (Interrupted, KeyboardInterrupt)) else logging.ERROR
        trace = None if isinstance(error, UpstepError) else (type(error), error, error.__traceback__)
        text = f"{type(error).__name__}: {error}"
        handler.handle(log.makeRecord(log.name, level, __file__, 0, "%s", (text,), trace))
        raise
    finally:
        log.removeHandler(handler)
        steps_log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


class Metrics:
    """metrics.jsonl: one object a step; numbers that are not finite are written as null.

    step: the first to be written; rows of earlier steps are kept, those of a run that was killed after its last
    checkpoint are cut off.
    tensorboard: every number also goes, under the same name, to an event file beside it.
    """

    def __init__(self, path: Path, step: int = 0, tensorboard: bool = False):
        # unbuffered: a killed run loses no line, and a full disk is met where the line is written
        self._file = path.open("r+b" if step and path.exists() else "wb", buffering=0)
        self._file.truncate(_bytes_of_rows(path, step))
        self._file.seek(0, os.SEEK_END)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # a killed run's events of steps that are taken again are hidden
            self._board = SummaryWriter(str(path.parent), purge_step=step)

    def write(self, row: dict[str, Any]) -> None:
        """Appends one line and hands it to the system at once. Raises OSError if the disk refuses."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        left = memoryview((json.dumps(clean) + "\n").encode())
        while left:
            left = left[self._file.write(left) :]
        for name, value in clean.items() if self._board else ():
            if name != "step" and isinstance(value, (int, float)):
                self._board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Forces what was written to disk. Raises OSError."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _bytes_of_rows(path: Path, steps: int) -> int:
    kept = 0
    with path.open("rb") as file:
        for row in range(steps):
            line = file.readline()
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


class Progress:
    """The progress line: step, time left, images/s, loss, centre magnitude, skipped and data-wait percentages.

    A moving bar on a terminal; one line every `log_every` steps elsewhere; in train.log alone if quiet.
    """

    def __init__(self, config: AdaptConfig, state: GateState):
        assert config.steps is not None
        self._steps, self._every, self._batch = config.steps, config.log_every, config.batch_size
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
        """Takes one row of metrics."""
        self._done += 1
        self._waited += row["data_wait"]
        self._loss = row["loss"] if row["loss"] is not None else self._loss
        seconds = max(1e-9, time.monotonic() - self._start)
        rate = (self._done - self._first) * self._batch / seconds
        text = (
            f"{rate:,.0f} images/s  loss {self._loss:.3f}  centre {row['center']:.3f}  "
            f"skipped {100 * (1 - state.opened / state.step):.0f}%  data wait {100 * self._waited / seconds:.0f}%"
        )
        assert self._task is not None
        self._bar.update(self._task, advance=1, description=text)
        if self._done % self._every == 0 or self._done == self._steps:
            left = seconds / (self._done - self._first) * (self._steps - self._done)
            line = f"step {self._done}/{self._steps}  {text}  left {left:,.0f} s"
            steps_log.info("%s", line)
            if self._plain and not self._quiet:
                print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps, completed=self._first)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def print_scores(result: dict[str, Any]) -> None:
    """The table of `evaluate`, in percent, with the change against the base model's features as they are."""
    table = Table(title=f"{result['n_train']} train, {result['n_test']} test images, k = {result['k']}")
    table.add_column("features")
    kinds = [kind for kind in ("base", "adapted", "ensemble") if kind in result]
    columns = {
        title: {kind: result[kind][key] for kind in kinds}
        for measure in ("knn", "linear")
        for title, key in ((measure, measure), (f"{measure}, whitened", f"{measure}_whitened"))
    }
    if "source" in result:
        columns |= {"source knn": result["source"], "source knn, whitened": result["source_whitened"]}
    for name in columns:
        table.add_column(name, justify="right")
    for kind in kinds:
        cells = []
        for title, row in columns.items():
            plain = columns[title.removesuffix(", whitened")]
            change = "" if kind == "base" and row is plain else f" ({row[kind] - plain['base']:+.1f})"
            cells.append(f"{row[kind]:.1f}{change}")
        table.add_row(kind, *cells)
    terminal.show(table)


def print_timings(result: dict[str, Any]) -> None:
    """The table of `benchmark.run`: medians with quartiles, ratios against the first variant."""
    card = result["device"]
    for kind in ("backward", "forward"):
        table = Table(
            title=f"{'forward and backward' if kind == 'backward' else 'forward'}, {result['config']['model']}"
        )
        for column in ("variant", "ms (quartiles)", "speed-up", "peak GiB", "error"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for row in result[kind]:
            table.add_row(
                row["name"],
                f"{row['median_ms']:.1f} ({row['low_ms']:.1f}..{row['high_ms']:.1f})",
                f"{result[kind][0]['median_ms'] / row['median_ms']:.2f}x",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['error']:.1e}",
            )
        terminal.show(table)
    print(f"on {card.get('gpu', card['processor'])}, {card['threads']} threads, torch {card['torch']}")
