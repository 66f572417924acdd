"""Values that change over a run, as pure functions of the step."""

from __future__ import annotations

import math

from upstep_fast.config.training import OptimizationConfig


def learning_rate(run: OptimizationConfig, step: float) -> float:
    """Return the learning rate at `step`: linear warm-up to the peak, then as `lr_schedule` says."""
    return run.lr * warmup_cosine(step, run.num_steps, run.warmup, is_constant=run.lr_schedule == "constant")


def warmup_cosine(step: float, steps: int, warmup: float, is_constant: bool = False) -> float:
    """Return the factor on the peak learning rate: linear warm-up, then cosine to 0. Skipped steps advance it too.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on. is_constant: 1 after the warm-up.
    """
    rising = warmup * steps if warmup < 1 else warmup
    if step < rising:
        return (step + 1) / (rising + 1)
    if is_constant:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, steps - rising)))


def cosine(step: float, steps: int, start: float, end: float) -> float:
    """Return the value at `step` of half a cosine from `start` at step 0 to `end` at the last step."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / max(1, steps - 1)))


def linear_warmup(step: float, steps: int, warmup: float, start: float, end: float) -> float:
    """Return the value at `step` of a line from `start` to `end`, constant after the warm-up.

    warmup: a fraction of `steps` below 1, a number of steps from 1 on.
    """
    rising = warmup * steps if warmup < 1 else warmup
    return end if step >= rising else start + (end - start) * step / rising
