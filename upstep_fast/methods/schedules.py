"""Values that change over a run, as pure functions of the step."""

from __future__ import annotations

import math


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak learning rate: linear warm-up, then cosine to 0. Skipped steps advance it too.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on.
    """
    rising = warmup * steps if warmup < 1 else warmup
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at the last step, by half a cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def linear_warmup(step: int, steps: int, warmup: float, start: float, end: float) -> float:
    """From `start` in a straight line to `end`, which it has from the end of the warm-up on.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on.
    """
    rising = warmup * steps if warmup < 1 else warmup
    return end if step >= rising else start + (end - start) * step / rising
