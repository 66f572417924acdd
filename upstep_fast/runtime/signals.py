"""Signals as wishes that the loop looks at between two steps; under torchrun one rank's wish is everyone's."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from upstep_fast.runtime import distributed

WISHES = 2  # stop, save


class Asked:
    """What signals and the clock have asked for.

    save_seconds: also ask for a save when so many seconds have passed since the last one; 0: never.
    """

    def __init__(self, save_seconds: float = 0.0) -> None:
        self.stop, self.save = False, False
        self._save_seconds, self._saved = save_seconds, time.monotonic()
        self._agreed = (False, False)

    def pending(self) -> list[float]:
        """This rank's wishes as numbers, to be summed over the ranks."""
        # one clock for all ranks: whoever is first by its own asks for all
        is_due = 0 < self._save_seconds <= time.monotonic() - self._saved
        return [float(self.stop), float(self.save or is_due)]

    def agree(self, sums: Sequence[float]) -> None:
        """Take the sums of all ranks' wishes."""
        self._agreed = (sums[0] > 0, sums[1] > 0)

    def settle(self) -> tuple[bool, bool]:
        """Whether to stop and whether to save, the same on every rank; what is asked for once counts as done.

        Alone a wish counts at once; under torchrun once all ranks have heard of it, which is a step later at most.
        """
        if distributed.size() == 1:
            self.agree(self.pending())
        stop, save = self._agreed
        self._agreed = (False, False)
        if save:
            self.save, self._saved = False, time.monotonic()
        return stop, save


@contextlib.contextmanager
def signals(save_seconds: float = 0.0) -> Iterator[Asked]:
    """Turn SIGINT and SIGTERM into a wish to stop, SIGUSR1 into one to save; handlers are put back afterwards.

    A second SIGINT or SIGTERM acts as usual. Not under torchrun, which passes on to every rank a Ctrl-C that all have
    had from the terminal, and kills after half a minute who has not ended.
    """
    asked = Asked(save_seconds)

    def stop(number: int, frame: Any) -> None:
        asked.stop = True
        if not distributed.launched():
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
