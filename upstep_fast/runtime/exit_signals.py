"""Signals that end the program, from its first import on; the training loop has handlers of its own (signals.py).

SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that unfinished files are removed and locks released on the way
out, and the exit code is that of an interrupted run. While the program still imports there is nothing to remove, and
imports can drop exceptions and go on for seconds: until `started` it ends in the handler. Imports nothing slow.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any, NoReturn

from upstep_fast.errors import Interrupted

_received: list[int] = []
_is_starting = False


def numbers() -> list[int]:
    """Return those of SIGINT, SIGTERM and SIGHUP that the system has and that are not ignored, as `nohup` asks."""
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def install(*, starting: bool = False) -> None:
    """Let these signals raise KeyboardInterrupt in the main thread. starting: or end the process, until `started`."""
    global _is_starting
    _is_starting = starting
    for number in numbers():
        signal.signal(number, _interrupt)


def started() -> None:
    """From now on let signals raise KeyboardInterrupt."""
    global _is_starting
    _is_starting = False


def ignore() -> None:
    """Ignore these signals: the program has ended and its exit code is to stay."""
    for number in numbers():
        signal.signal(number, signal.SIG_IGN)


def was_interrupted() -> bool:
    """Return whether a signal has come: imports can turn the KeyboardInterrupt into an error of their own."""
    return bool(_received)


def check() -> None:
    """Raise KeyboardInterrupt if a signal has come and the one it raised was lost, as in torch's import of numpy."""
    if _received:
        raise KeyboardInterrupt


def forget() -> None:
    """Forget the signals of an earlier command in this process."""
    _received.clear()


def _interrupt(number: int, frame: Any) -> None:
    if _received and "TORCHELASTIC_RUN_ID" in os.environ:
        return  # torchrun forwards a Ctrl-C that the terminal has sent to all ranks, and ends those that stay
    _received.append(number)
    if _is_starting:
        _exit()
    raise KeyboardInterrupt(signal.Signals(number).name)


def _exit() -> NoReturn:
    shown = b"\r\x1b[2K\x1b[?25h" if os.isatty(2) and os.environ.get("TERM") != "dumb" else b""  # a progress bar
    with contextlib.suppress(OSError):  # not by print: what the signal interrupts may be printing
        os.write(2, shown + b"upstep-fast: interrupted\n")
    os._exit(Interrupted.exit_code)
