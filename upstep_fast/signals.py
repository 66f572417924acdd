"""Signals as wishes that the loop looks at between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Asked:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.stop, self.save = False, False

    def take(self) -> bool:
        """Whether to save; asked for once, it counts as done."""
        save, self.save = self.save, False
        return save


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Turns SIGINT and SIGTERM into a wish to stop, SIGUSR1 into one to save; handlers are put back afterwards.

    A second SIGINT or SIGTERM acts as usual.
    """
    asked = Asked()

    def stop(number: int, frame: Any) -> None:
        asked.stop = True
        signal.signal(number, before[number])

    def save(number: int, frame: Any) -> None:
        asked.save = True

    handlers: dict[int, Any] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    before = {number: signal.getsignal(number) for number in handlers}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers; elsewhere signals are the caller's
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield asked
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in before.items():
                signal.signal(number, handler)
