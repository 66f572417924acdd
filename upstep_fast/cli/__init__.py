"""What a user types: commands, their help and the tools beside adapt."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from upstep_fast.errors import Interrupted
from upstep_fast.runtime import exit_signals, started, thread_waits

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; argv: its arguments, None for those of this process.

    As the program itself (None) it handles signals from here on, before anything slow is imported.
    """
    if argv is None:
        _open_streams()
        thread_waits.limit_spinning(os.environ)
        exit_signals.install(starting=True)
        started.note()
    try:
        from upstep_fast.cli.commands import main as run

        run(argv)
    except KeyboardInterrupt:  # during these imports, or while another ended the program
        print("upstep-fast: interrupted", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
    finally:
        if argv is None:
            exit_signals.ignore()
            gc.freeze()  # the interpreter's last collections would take seconds over the objects of torch's modules


def _open_streams() -> None:
    """Open stdin, stdout and stderr on the null device where they are closed (`2>&-`): Python has None for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the closed number, which a file of ours would get otherwise
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115  (for the whole program)
