"""When the program was started, for what is to end within a time. Imports nothing slow."""

from __future__ import annotations

import time

_program: float | None = None


def note() -> None:
    """Note that the program starts now."""
    global _program
    _program = time.monotonic()


def began() -> float:
    """Return `time.monotonic()` of the program's start; of now, if this is a function's call in another program."""
    return time.monotonic() if _program is None else _program
