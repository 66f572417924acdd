"""Errors and warnings as lines on stderr: one each, without control characters."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from upstep_fast.errors import MAX_LINE, ConfigError, first_line, printable
from upstep_fast.runtime import terminal


def print_error(text: str) -> None:
    """Print the final line of a command that failed: the program, its rank under torchrun, and the message."""
    # not by distributed.py: a usage error need not wait for torch
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    program = f"upstep-fast{'' if rank == '0' else f' (rank {rank})'}:"
    if terminal.has_color(stderr=True):
        program = f"\x1b[31m{program}\x1b[0m"
    # names of files, classes and tensors are of others: none may move the cursor or start a line of its own
    print(program, printable(text, MAX_LINE), file=sys.stderr)


def describe_system_error(error: OSError | MemoryError, args: Sequence[str]) -> tuple[str, int]:
    """Return the line and the exit code for an error of the system that no command expected where it happened."""
    if isinstance(error, MemoryError):
        return "memory: the system has no more for this command; use smaller inputs or a lower --batch-size", 1
    # filename: an integer where the call was given a descriptor
    path = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    reason = error.strerror or first_line(error)
    if not path:
        return f"{args[0]}: the system refused: {reason}; free the resource that it names and run again", 1
    flag = "file"
    for arg in args:
        flag = arg[2:].partition("=")[0] if arg.startswith("--") else flag
        if (arg.partition("=")[2] if arg.startswith("--") else arg) == path:
            return f"{flag}: cannot use {path}: {reason}; give another path", ConfigError.exit_code
    return f"file: cannot use {path}: {reason}; make it accessible and run again", 1


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, as sys.excepthook does, without control characters."""
    for line in "".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n"):
        print(printable(line, MAX_LINE), file=sys.stderr)


def format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """Return a library's warning on one line, as ours are; its place in the code is of no use here."""
    return f"WARNING {printable(' '.join(str(message).split()), MAX_LINE)}\n"
