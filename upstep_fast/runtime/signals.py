"""Signal handlers set flags that the loop polls between steps; under torchrun a flag on any rank applies to all."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

from upstep_fast.runtime import distributed, exit_signals, progress

NUM_FLAGS = 2  # stop, save


class StopRequests:
    """Requests to stop or to save, from signals and the clock.

    save_seconds: also request a save once this many seconds have passed since the last one; 0: never.
    """

    def __init__(self, save_seconds: float = 0.0) -> None:
        self.stop, self.save = False, False
        self._save_seconds, self._saved = save_seconds, time.monotonic()
        self._reduced = (False, False)

    def local_flags(self) -> list[float]:
        """Return this rank's flags as numbers, [NUM_FLAGS], to be summed over the ranks."""
        # clocks differ between ranks: the first whose time is up requests the save for all
        is_due = 0 < self._save_seconds <= time.monotonic() - self._saved
        return [float(self.stop), float(self.save or is_due)]

    def set_reduced(self, sums: Sequence[float]) -> None:
        """Set the sums over all ranks of `local_flags`, [NUM_FLAGS]."""
        self._reduced = (sums[0] > 0, sums[1] > 0)

    def poll(self) -> tuple[bool, bool]:
        """Return (stop, save), equal on all ranks, and clear both.

        With one process a request takes effect immediately, with several at most one step later.
        """
        if distributed.size() == 1:
            self.set_reduced(self.local_flags())
        stop, save = self._reduced
        self._reduced = (False, False)
        if save:
            self.save, self._saved = False, time.monotonic()
        return stop, save


@contextlib.contextmanager
def signals(save_seconds: float = 0.0) -> Iterator[StopRequests]:
    """Turn SIGINT, SIGTERM and SIGHUP into a stop and SIGUSR1 into a save request; restore the handlers afterwards.

    A second signal to stop has its usual effect, except under torchrun: torchrun forwards a Ctrl-C to every rank
    although the terminal has sent it to all of them, and kills ranks that have not ended half a minute later.
    """
    exit_signals.check()
    requests = StopRequests(save_seconds)

    def stop(number: int, frame: Any) -> None:
        requests.stop = True
        text = f"{signal.Signals(number).name}: stopping as soon as this step is done and saved"
        if not distributed.launched():
            signal.signal(number, previous[number])
            text += "; once more stops at once"
        progress.say(text)

    def save(number: int, frame: Any) -> None:
        requests.save = True

    handlers: dict[int, Any] = dict.fromkeys({signal.SIGINT, signal.SIGTERM, *exit_signals.numbers()}, stop)
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    previous = {number: signal.getsignal(number) for number in handlers}
    with contextlib.suppress(ValueError):  # only the main thread may set handlers; in others the caller handles signals
        for number, handler in handlers.items():
            signal.signal(number, handler)
    try:
        yield requests
    finally:
        with contextlib.suppress(ValueError):
            for number, handler in previous.items():
                signal.signal(number, handler)
