"""Terminal output: results go to stdout, messages to stderr; only terminals get colors, boxes and progress bars.

A stream is plain with --plain, if it is not a terminal (a pipe, a file, a CI job) or if TERM is dumb: no colors, no
progress bar, tables as Markdown in lines that are never wrapped. NO_COLOR (https://no-color.org) turns off colors only.
--quiet suppresses everything but warnings, errors and results.
"""

from __future__ import annotations

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
    """Return a rich console on the current stdout (or stderr)."""
    if is_plain(stderr=stderr):
        # rich would wrap at 80 columns and treat FORCE_COLOR as a terminal
        width: dict[str, Any] = {"force_terminal": False, "color_system": None, "width": 10_000}
        return Console(stderr=stderr, markup=False, emoji=False, **width)
    return Console(stderr=stderr, markup=False, emoji=False)


def format_duration(seconds: float) -> str:
    """Return a duration as text: "45 s", "12 min" or "2 h 10 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


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
