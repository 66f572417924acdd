"""Progress of slow work: a bar on a terminal, otherwise a line when nothing was printed for a few seconds.

    with track("embed", len(source), "images") as task:
        for batch in batches:
            ...
            task.advance(len(batch))

Contexts nest; the innermost one is shown. A thread prints the lines, so that a single long step is not silent either.
--quiet shows nothing, and ranks other than the first show nothing. Imports nothing slow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from upstep_fast.errors import printable
from upstep_fast.runtime import terminal
from upstep_fast.runtime.terminal import format_duration

log = logging.getLogger("upstep_fast")

# seconds without a line, at most: during the first EARLY seconds, and later
SHORT, LONG, EARLY = 1.5, 2.5, 60.0  # the import of torch lets no thread run for another second
# an estimate of the time is made after so many advances, or after the first if it took so many seconds; it is logged
# for work of at least so many seconds
MARKS, SLOW, LONG_WORK = 4, 20.0, 60.0


class Task:
    """Work in progress: `done` of `total` units. total: None if unknown.

    device: "cpu" or "cuda", where the work runs; with it, an estimate of the time is logged once it is known.
    """

    def __init__(self, name: str, total: int | None = None, unit: str = "images", done: int = 0, device: str = ""):
        self.name, self.total, self.unit, self.done, self._device = name, total, unit, done, device
        self._marks: list[tuple[float, int]] = []  # when units were first done, and how many then
        self.note = ""  # replaces the rate
        self.plain: Callable[[float], str] | None = None  # replaces the line in a pipe; takes the seconds left
        self._first, self._began = done, time.monotonic()
        self._advanced = self._began

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        self._advanced = time.monotonic()
        if len(self._marks) < MARKS:
            self._marks.append((self._advanced, self.done))
            if self._device and self.total:
                self._estimate()

    def _estimate(self) -> None:
        """Log the time of all units once enough is done: the first ones compile and warm up, so they do not count.

        If the first took long, it gives an upper bound at once.
        """
        each = self.seconds_per_unit
        slow = len(self._marks) == 1 and self._advanced - self._began >= SLOW
        if each is None or not (slow or len(self._marks) == MARKS):
            return
        assert self.total is not None
        if (seconds := self.total * each) >= LONG_WORK:
            where = {"cpu": "this CPU", "cuda": "this GPU"}.get(self._device, self._device)
            how = "at most" if slow else "about"
            log.info("%s: %s %s on %s", self.name, how, format_duration(seconds), where)

    @property
    def seconds_per_unit(self) -> float | None:
        """Seconds that a unit takes: without the first ones if others followed; None before the first."""
        began, first = self._marks[0] if self._marks and self.done > self._marks[0][1] else (self._began, self._first)
        return (self._advanced - began) / (self.done - first) if self.done > first else None

    def line(self, *, plain: bool = False) -> str:
        """Return the state as text: "embed: 1,200 of 5,000 images, 34/s, 1 min 52 s left". plain: for a pipe."""
        now = time.monotonic()
        each = self.seconds_per_unit
        if self.total is None or each is None:
            count = "" if self.total is None else f"0 of {self.total - self._first:,} {self.unit}, "
            return f"{self.name}: {count}{format_duration(now - self._began)} so far"
        average = (self._advanced - self._began) / (self.done - self._first)
        text = f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {self.note or _rate(average)}"
        if self.done >= self.total:
            since = now - self._advanced
            return f"{text}, finishing: {format_duration(since)} so far" if since >= 1 else text
        left = max(1.0, each * (self.total - self.done) - (now - self._advanced))
        return self.plain(left) if plain and self.plain else f"{text}, {format_duration(left)} left"


def _rate(each: float) -> str:
    rate = 1 / max(each, 1e-9)
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s" if rate >= 0.1 else f"{format_duration(each)} each"


class _Display:
    """The thread that shows the innermost task, and the bar of a terminal."""

    def __init__(self, task: Task) -> None:
        self.tasks = [task]
        self._began = time.monotonic()
        # work that follows at once on other work goes on waiting for the line that was due there
        self.printed = _printed if self._began - _ended < SHORT else self._began
        self.said: list[str] = []  # lines that wait to be printed
        self._stop = threading.Event()
        self._is_plain = terminal.is_plain(stderr=True)
        self._bar: Progress | None = None
        self._thread = threading.Thread(target=self._run, name="upstep-progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(Exception):  # a closed stream must not end more than the progress
                while self.said:
                    log.info("%s", self.said.pop(0))
                self._show()

    def _show(self) -> None:
        now = time.monotonic()
        task = self.tasks[-1]
        if not self._is_plain:
            self._draw(task)
        elif now - self.printed >= (SHORT if now - self._began < EARLY else LONG):
            self.printed = now
            print(printable(task.line(plain=True)), file=sys.stderr, flush=True)

    def _draw(self, task: Task) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
            console = terminal.console(stderr=True)
            # what goes to stdout must not be redirected: it may be a file
            self._bar = Progress(*columns, console=console, transient=True, redirect_stdout=False)
            self._bar.add_task("")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=task.line(), total=task.total, completed=task.done)

    def close(self) -> None:
        """End the thread and remove the bar."""
        self._stop.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.stop()


_display: _Display | None = None
_printed = _ended = time.monotonic()  # of the display before: its last line, or its start, and its end


@contextlib.contextmanager
def track(name: str, total: int | None = None, unit: str = "images", done: int = 0, device: str = "") -> Iterator[Task]:
    """Show the progress of the work within the context, whose task it yields: call `advance` on it.

    total, unit, done: number of units of work, their name in the plural, and those done before. device: see `Task`.
    """
    global _display, _printed, _ended
    task = Task(name, total, unit, done, device)
    is_first = "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0"
    if terminal.is_quiet() or not is_first:
        yield task
        return
    if _display is not None:
        _display.tasks.append(task)
        try:
            yield task
        finally:
            _display.tasks.remove(task)
        return
    _display = display = _Display(task)
    try:
        yield task
    finally:
        _display = None
        display.close()
        _printed, _ended = display.printed, time.monotonic()


def printed() -> None:
    """Note that a line was just printed, so that the next one of the progress is not due yet."""
    if _display is not None:
        _display.printed = time.monotonic()


def say(text: str) -> None:
    """Log a line from the display's thread: a signal handler must not print, as what it interrupts may be printing."""
    if _display is not None:
        _display.said.append(text)
