"""Heartbeats between ranks through torchrun's store: which ranks are alive, and which one failed first.

Once a second each rank publishes a beat and the number of collectives that it has entered. A rank that fails publishes
its error. A rank whose collective failed looks up the first cause, and a rank that hangs after another's failure is
ended by its heartbeat thread.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

BEAT_SECONDS = 1.0
LAST_SECONDS = 10.0  # for the last files and messages once another rank has failed; torchrun allows 30


class Heartbeat:
    """Publishes this rank's heartbeat and, on failure, its error in `store` (no other user).

    store: a torch.distributed Store. entered: returns the number of collectives that this rank has entered. cure: what
    the user can do after a failure, the end of its message.
    """

    def __init__(self, store: Any, rank: int, size: int, entered: Callable[[], int], cure: str):
        self._store, self._entered, self._cure = store, entered, cure
        self._rank, self._size, self._beats = rank, size, 0
        self._seen: dict[int, tuple[int, float]] = {}  # by rank: beats, and when they last changed
        self._looked = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upstep-heartbeat", daemon=True)

    def record_end(self, reason: str, key: str) -> bool:
        """Record why the run ends. Return True if this rank was first. key: "cause" (a failure) or "stopped"."""
        with contextlib.suppress(RuntimeError):  # the store ends with torchrun
            mine = f"{self._rank} {reason}"
            return self._store.compare_set(key, "", mine).decode(errors="replace") == mine
        return True

    def wait_for_rank_0(self) -> None:
        """Wait until rank 0 has written its files; torchrun kills all ranks once one exits. Timeout: LAST_SECONDS."""
        with contextlib.suppress(RuntimeError):
            if self._rank == 0:
                self._store.set("written", "")
            else:
                self._store.wait(["written"], datetime.timedelta(seconds=LAST_SECONDS))

    def find_cause(self) -> str:
        """Return why a collective failed: the recorded error, or the ranks without a heartbeat, or the late ones."""
        with contextlib.suppress(RuntimeError):
            others = [r for r in range(self._size) if r != self._rank]
            first = {r: self._read(r) for r in others}
            until = time.monotonic() + 3 * BEAT_SECONDS
            while time.monotonic() < until:
                if cause := self._recorded():
                    return cause
                time.sleep(0.1)
            second = {r: self._read(r) for r in others}
            if silent := [r for r in others if second[r] == first[r]]:
                return f"ranks: no heartbeat from {_named(silent)}, killed or stopped; {self._cure}"
            if late := [r for r in others if second[r][1] < self._entered()]:
                return (
                    f"ranks: {_named(late)} did not reach the collective in which the others wait, though alive; "
                    f"{self._cure}"
                )
        return f"ranks: the connection to the other ranks broke; {self._cure}"

    def lost(self, seconds: float) -> str | None:
        """Return why the others cannot go on, or None: a recorded error, or ranks without a heartbeat for `seconds`.

        Does not wait; looks once a beat at most.
        """
        now = time.monotonic()
        if now - self._looked < BEAT_SECONDS:
            return None
        self._looked = now
        with contextlib.suppress(RuntimeError):
            if cause := self._recorded():
                return cause
            for rank in (r for r in range(self._size) if r != self._rank):
                beats, _ = self._read(rank)
                if rank not in self._seen or self._seen[rank][0] != beats:
                    self._seen[rank] = beats, now
            if silent := [rank for rank, (_, since) in self._seen.items() if now - since > seconds]:
                return f"ranks: no heartbeat from {_named(silent)}, killed or stopped; {self._cure}"
            return None
        return f"ranks: the connection to the other ranks broke; {self._cure}"

    def all_at(self, point: str, arrive: bool) -> bool:
        """Return True once all ranks are at `point`. arrive: this rank reaches it now."""
        with contextlib.suppress(RuntimeError):
            return self._store.add(f"at/{point}", int(arrive)) >= self._size
        return False

    def _recorded(self) -> str | None:
        if not self._store.check(["cause"]):
            return None
        number, _, reason = self._store.get("cause").decode(errors="replace").partition(" ")
        return f"rank {number}: {reason}"

    def _read(self, rank: int) -> tuple[int, int]:
        beats, entered = self._store.get(f"heartbeat/{rank}").decode().split()
        return int(beats), int(entered)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"heartbeat/{self._rank}", f"{self._beats} {self._entered()}")

    def _run(self) -> None:
        left = LAST_SECONDS
        with contextlib.suppress(RuntimeError):
            while not self._stopped.wait(BEAT_SECONDS):
                self._beat()
                left -= BEAT_SECONDS * self._store.check(["cause"])
                if left < 0:  # the main thread hangs in a call that no exception reaches
                    os._exit(1)

    def __enter__(self) -> Heartbeat:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
