"""Who lives, and who was the first cause: what ranks tell each other beside the collectives, by torchrun's store.

Each rank tells the store once a second that it lives and how many collectives it has entered. A rank that failed notes
why; one that waited in vain reads who was the cause; one that hangs is ended by its own thread here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

PULSE_SECONDS = 1.0
LAST_SECONDS = 10.0  # what a rank has for its last words when another has failed; torchrun gives it 30


class Pulse:
    """Notes in `store`, which is this object's alone, that this rank lives, and what it failed of.

    entered: gives the number of collectives that this rank has entered.
    """

    def __init__(self, store: Any, rank: int, size: int, entered: Callable[[], int]):
        self._store, self._entered = store, entered
        self._rank, self._size, self._beats = rank, size, 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstep-pulse", daemon=True)

    def note(self, text: str, key: str) -> bool:
        """Whether this rank is the first to note why all end; `text` is it then. key: "cause" or "stopped"."""
        with contextlib.suppress(RuntimeError):  # the store went with torchrun
            mine = f"{self._rank} {text}"
            return self._store.compare_set(key, "", mine).decode(errors="replace") == mine
        return True

    def wait_for_first(self) -> None:
        """Until rank 0 has written what a stopped run writes: torchrun ends all as soon as the first has ended."""
        with contextlib.suppress(RuntimeError):
            if self._rank == 0:
                self._store.set("written", "")
            else:
                self._store.wait(["written"], datetime.timedelta(seconds=LAST_SECONDS))

    def cause(self) -> str:
        """Why a collective failed, as far as can be known: what a rank has noted, else who gives no sign of life."""
        with contextlib.suppress(RuntimeError):
            others = [r for r in range(self._size) if r != self._rank]
            before = {r: self._read(r) for r in others}
            until = time.monotonic() + 3 * PULSE_SECONDS
            while time.monotonic() < until:
                if self._store.check(["cause"]):
                    number, _, text = self._store.get("cause").decode(errors="replace").partition(" ")
                    return f"rank {number}: {text}"
                time.sleep(0.1)
            after = {r: self._read(r) for r in others}
            if quiet := [r for r in others if after[r] == before[r]]:
                return f"ranks: no sign of life from {_named(quiet)}, killed or stopped; go on with --resume"
            if late := [r for r in others if after[r][1] < self._entered()]:
                return f"ranks: {_named(late)} did not come to where the others wait, though alive; go on with --resume"
        return "ranks: the connection to the others broke; go on with --resume"

    def _read(self, rank: int) -> tuple[int, int]:
        beats, entered = self._store.get(f"pulse/{rank}").decode().split()
        return int(beats), int(entered)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"pulse/{self._rank}", f"{self._beats} {self._entered()}")

    def _run(self) -> None:
        left = LAST_SECONDS
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(PULSE_SECONDS):
                self._beat()
                left -= PULSE_SECONDS * self._store.check(["cause"])
                if left < 0:  # the main thread hangs somewhere and will not hear of it
                    os._exit(1)

    def __enter__(self) -> Pulse:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
