"""Terminal output: results go to stdout, messages to stderr; only terminals get colors, boxes and progress bars.

A stream is plain with --plain, if it is not a terminal (a pipe, a file, a CI job) or if TERM is dumb: no colors, no
progress bar, tables as Markdown in lines that are never wrapped. NO_COLOR (https://no-color.org) turns off colors only.
--quiet suppresses everything but warnings, errors and results.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


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
        return Console(stderr=stderr, force_terminal=False, color_system=None, width=10_000)
    return Console(stderr=stderr)


def format_duration(seconds: float) -> str:
    """Return a duration as text: "45 s", "12 min" or "2 h 10 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def show(table: Table) -> None:
    """Print a table to stdout."""
    if is_plain():
        table.box = box.MARKDOWN
        table.title_justify = "left"
    console().print(table)
