"""Terminal output: results go to stdout, messages to stderr; only terminals get colors, boxes and progress bars.

A stream is plain with --plain, if it is not a terminal (a pipe, a file, a CI job) or if TERM is dumb: no colors, no
progress bar, tables as Markdown in lines that are never wrapped. NO_COLOR (https://no-color.org) turns off colors only.
--quiet suppresses everything but warnings, errors and results.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from typing import Any

import rich.table
from rich import box
from rich.console import Console

from upstep_fast.errors import printable


@dataclass(frozen=True)
class Style:
    """Output flags of the command line."""

    plain: bool = False
    quiet: bool = False


_style = Style()


def set_style(*, plain: bool = False, quiet: bool = False) -> None:
    """Set the style of this process, from the flags of the command line."""
    global _style
    _style = Style(plain, quiet)


def is_quiet() -> bool:
    """Return True if only warnings, errors and results are to be printed."""
    return _style.quiet


def is_plain(*, stderr: bool = False) -> bool:
    """Return True if stdout (or stderr) gets plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return _style.plain or not stream.isatty() or os.environ.get("TERM") == "dumb"


def has_color(*, stderr: bool = False) -> bool:
    """Return True if colors may be written to stdout (or stderr)."""
    return not is_plain(stderr=stderr) and not os.environ.get("NO_COLOR")


def console(*, stderr: bool = False) -> Console:
    """Return a rich console on the current stdout, or the one on the current stderr."""
    if not stderr:
        return _console(False, is_plain())
    # while a bar is shown, rich stands in for the stream
    stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
    return _stderr_console(is_plain(stderr=True), has_color(stderr=True), stream)


@functools.lru_cache(maxsize=1)
def _stderr_console(plain: bool, color: bool, stream: Any) -> Console:
    """Return one console for a bar and for log lines, which must not be written across it."""
    return _console(True, plain)


def _console(stderr: bool, plain: bool) -> Console:
    if plain:
        # rich would wrap at 80 columns and treat FORCE_COLOR as a terminal
        width: dict[str, Any] = {"force_terminal": False, "color_system": None, "width": 10_000}
        return Console(stderr=stderr, markup=False, emoji=False, **width)
    return Console(stderr=stderr, markup=False, emoji=False)


def format_duration(seconds: float) -> str:
    """Return a duration as text: "45 s", "1 min 52 s", "12 min", "2 h 10 min" or "18 d 14 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 1 else f"{whole} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(minutes / 60)
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


class Table(rich.table.Table):
    """A table whose cells are shown as they are: no markup, and on one line without control characters."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row; strings lose what steers a terminal."""
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def print_line(text: str) -> None:
    """Print one line of a result to stdout, without control characters, whatever names it holds."""
    print(printable(text, len(text)))


def show(table: rich.table.Table) -> None:
    """Print a table to stdout."""
    if is_plain():
        table.box = box.MARKDOWN
        table.title_justify = "left"
    console().print(table)


def counted(count: int, unit: str) -> str:
    """Return "1 step", "2,000 steps"."""
    return f"{count:,} {unit}{'s' * (count != 1)}"
