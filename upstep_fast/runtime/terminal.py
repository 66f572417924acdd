"""How text looks: results go to stdout, messages to stderr; colours, boxes and moving bars to terminals only.

A stream is plain if --plain was given, if it is no terminal (a pipe, a file, a CI job) or if TERM is dumb: no colours,
no moving bar, tables as Markdown in lines that are never wrapped. NO_COLOR (https://no-color.org) takes the colours
alone.
--quiet leaves warnings, errors and results.
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
    """What the command line asked for."""

    plain: bool = False
    quiet: bool = False


_style = Style()


def set_style(*, plain: bool = False, quiet: bool = False) -> None:
    """Set the style of this process, from the flags of the command line."""
    global _style
    _style = Style(plain, quiet)


def is_quiet() -> bool:
    """Whether only warnings, errors and results are wanted."""
    return _style.quiet


def is_plain(*, stderr: bool = False) -> bool:
    """Whether stdout (or stderr) gets plain text."""
    stream = sys.stderr if stderr else sys.stdout
    return _style.plain or not stream.isatty() or os.environ.get("TERM") == "dumb"


def has_color(*, stderr: bool = False) -> bool:
    """Whether colours may be written to stdout (or stderr)."""
    return not is_plain(stderr=stderr) and not os.environ.get("NO_COLOR")


def console(*, stderr: bool = False) -> Console:
    """A rich console on the stream as it is now."""
    if is_plain(stderr=stderr):
        # rich would cut at 80 columns, and take FORCE_COLOR for a terminal
        return Console(stderr=stderr, force_terminal=False, color_system=None, width=10_000)
    return Console(stderr=stderr)


def show(table: Table) -> None:
    """Print a table to stdout."""
    if is_plain():
        table.box = box.MARKDOWN
        table.title_justify = "left"
    console().print(table)
