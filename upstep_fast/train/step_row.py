"""Rows of metrics.jsonl: what the host knows of a step at once, and what the device tells a step later."""

from __future__ import annotations

import logging
import math
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.train.state import RunState

log = logging.getLogger("upstep_fast")


def row_of(state: RunState, config: AdaptConfig, *, is_open: bool, updated: bool) -> dict[str, Any]:
    """Return the row of metrics.jsonl of this step, with None for what comes from the device."""
    row = {
        "step": state.step,
        "loss": None,
        "center": None,
        "open": is_open,
        "lr": state.optimizer.param_groups[0]["lr"],
        "bad": None,
    }
    return row | ({"updated": updated} if config.optimization.accumulate > 1 else {})


def flush(state: RunState) -> None:
    """Wait for the previous step's results and complete its metrics row."""
    if state.pending is not None:
        complete_row(state, state.pending.numbers.tolist())


def complete_row(state: RunState, numbers: list[float]) -> None:
    """Complete the row of the pending step. numbers: values of `PendingStep.numbers`, on the host."""
    pending = state.pending
    assert pending is not None
    state.pending, row = None, pending.row
    magnitude, *results = numbers
    row["center"] = magnitude
    if not math.isfinite(magnitude):
        row["bad"] = f"the center's magnitude is {magnitude}"
    if row["open"]:
        row["loss"], is_finite, *metrics = results
        row |= zip(pending.metrics, metrics, strict=True)
        row["bad"] = _reason(row["loss"], bool(is_finite), state)
        state.loss = row["loss"]
    if collapsed := state.method.collapsed(row):
        row["collapsed"] = collapsed
    state.collapsed = state.collapsed + 1 if collapsed else 0
    if state.collapsed == 1:
        log.warning("step %d: collapse: %s", row["step"], collapsed)
    begin, decided, end = pending.marks
    row |= {"forward_s": _seconds(begin, decided), "backward_s": _seconds(decided, end)}


def _reason(loss: float, is_finite: bool, state: RunState) -> str | None:
    """Return why an update was not applied, or None."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    # under fp16 an overflow is the ordinary way to find the scale, as long as the scale can shrink
    if is_finite or (state.scaler.is_enabled() and state.scaler.get_scale() >= 1):
        return None
    return "a gradient is not finite"


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
