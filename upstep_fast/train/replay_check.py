"""--verify-resume: the first steps after a checkpoint are taken again from it and compared bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from upstep_fast.errors import RunFailedError
from upstep_fast.runtime.checkpoint import Checkpoint
from upstep_fast.train import resume
from upstep_fast.train.state import RunState

CLOCK = ("forward_s", "backward_s")  # no two runs agree on these

log = logging.getLogger("upstep_fast")

Repeat = Callable[[Checkpoint, int], tuple[list[dict[str, Any]], RunState]]


class ResumeCheck:
    """Checks one resume, `steps` long; 0: none.

    repeat: takes that many steps from a checkpoint, in a state of its own; returns their rows and that state.
    """

    def __init__(self, steps: int, repeat: Repeat):
        self._steps, self._repeat = steps, repeat
        self._found: Checkpoint | None = None
        self._rows: list[dict[str, Any]] = []

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the next checkpoint is the one to begin from."""
        return self._steps > 0 and self._found is None

    @property
    def is_on(self) -> bool:
        """Whether steps are being compared: their rows must be whole."""
        return self._steps > 0 and self._found is not None

    def begin(self, found: Checkpoint) -> None:
        """The steps from here on are compared."""
        self._found = found

    def after(self, row: dict[str, Any], state: RunState, is_last: bool) -> None:
        """Take note of a step; after the last one to compare, repeats them all. Raises RunFailedError."""
        if not self.is_on:
            return
        assert self._found is not None
        self._rows.append({name: value for name, value in row.items() if name not in CLOCK})
        if len(self._rows) < self._steps and not is_last:
            return
        rows, again = self._repeat(self._found, len(self._rows))
        wrong = [
            f"step {old['step']}: {key} was {old[key]}, is {new.get(key)}"
            for old, new in zip(self._rows, rows, strict=True)
            for key in old
            if repr(old[key]) != repr(new.get(key))
        ]
        wrong += resume.differences(state, again)
        if wrong:
            raise RunFailedError(
                f"verify_resume: {len(rows)} steps repeated from {self._found.path} are not the same: "
                f"{'; '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}"
            )
        log.info("verify_resume: %d steps repeated from %s are bit for bit the same", len(rows), self._found.path)
        self._steps = 0
