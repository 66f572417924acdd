"""The gate: update this step or skip it, by a pure rule and its state.

The rule compares m, the magnitude of the batch's center vector, with a reference (METHODS 1.6: the paper's own rule is
not published; these are our readings of it). With update_when "low" a step updates if m does not exceed the reference,
with "high" if it does not fall below.

    rule        reference
    prev        m of the previous step
    ema         moving average of m, decay gate_beta
    median      median of the last 64 m
    quantile    a threshold moved online so that a fraction gate_rate of the steps update, see below
    views       the other view's magnitude
    random      none: update with probability gate_rate (the control)
    alternate   none: update in a regular pattern, a fraction gate_rate of the steps
    none        always update

With another statistic than "center", m is the clustering loss of the batch or the mean distance between its images' two
views, for the rules prev, ema, median and quantile (ours, not the paper's).

The quantile's threshold r, with rate p, direction low (high: 1 - p for p, the other sign for the debt):

    spread <- 0.9 spread + 0.1 |m - m of the previous step|            how much m moves from step to step
    debt   <- debt + [update] - p, within 1 / 0.05                     updates beyond the rate; of steps that r decided
    r      <- r + spread (0.5 (p - [m < r]) - 0.05 debt)

The first part alone is quantile tracking, which lags behind where m falls for long, as it does in training.

The reference is updated on every step, skipped ones too. The first step updates, and so does the one after max_skips
skipped in a row. A step whose magnitude is not finite is skipped and leaves the reference alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.objective import GateConfig, Rule
from upstep_fast.data.keyed_random import uniform, uniform_array

_WINDOW = 64  # of the median rule: longer windows lag behind a falling m (METHODS 1.6)
_ON_DISK = {"num_updates": "opened"}  # fields of GateState that checkpoints hold by another name
_STEP, _CATCH_UP = 0.5, 0.05  # of the quantile's threshold, in units of m's own spread


@dataclass(frozen=True)
class GateRule(GateConfig):
    """The configured rule with its seed and experimental variants."""

    seed: int = 0
    unit: Literal["step", "image"] = "step"  # image: every step updates, from `select_images`
    statistic: Literal["center", "loss", "disagreement"] = "center"  # m

    @property
    def is_known_ahead(self) -> bool:
        """True if the decision needs no statistic, so that a skipped step can run without gradients."""
        return self.rule in ("none", "random", "alternate")


@dataclass(frozen=True)
class GateState:
    """The state of the rule; a checkpoint holds it as plain numbers."""

    step: int = 0
    num_updates: int = 0
    skips: int = 0  # in a row
    reference: float | None = None
    spread: float = 0.0  # of the quantile rule
    debt: float = 0.0  # of the quantile rule
    window: tuple[float, ...] = ()  # last m of the median rule; of quantile that of the previous step, if finite

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON holds them."""
        return {_ON_DISK.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GateState:
        """Return the state that `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        names = {written: name for name, written in _ON_DISK.items()}
        fields = {names.get(name, name): value for name, value in values.items()}
        state = cls(**{**fields, "window": tuple(fields["window"])})
        if any(type(n) is not int or n < 0 for n in (state.step, state.num_updates, state.skips)):
            raise ValueError("the gate's counts must be integers, at least 0")
        numbers = (state.reference or 0.0, state.spread, state.debt, *state.window)
        if any(isinstance(x, bool) or not math.isfinite(x) for x in numbers):
            raise ValueError("the gate's numbers must be finite")
        return state


def decide(rule: GateRule, state: GateState, magnitudes: Sequence[float]) -> tuple[bool, GateState]:
    """Return whether this is an update step, and the state after it.

    magnitudes: of the center over the whole batch, followed by that of each view where the rule is "views", and by the
    rule's statistic where that is another.
    """
    m = magnitudes[0] if rule.statistic == "center" else magnitudes[-1]
    if not all(math.isfinite(value) for value in magnitudes):
        window = () if rule.rule == "quantile" else state.window
        return False, replace(state, step=state.step + 1, skips=state.skips + 1, window=window)
    is_forced = state.step == 0 or state.skips >= rule.max_skips
    is_update = is_forced or _decide(rule, state, m, magnitudes)
    return is_update, replace(
        _update_reference(rule, state, m, None if is_forced else is_update),
        step=state.step + 1,
        num_updates=state.num_updates + is_update,
        skips=0 if is_update else state.skips + 1,
    )


def known_ahead(rule: GateRule, state: GateState) -> bool | None:
    """Return the decision of a rule that needs no statistic, before the step runs; None for the other rules."""
    if not rule.is_known_ahead:
        return None
    return decide(rule, state, (0.0,))[0]


def select_images(
    rule: Rule, contributions: Tensor, rate: float, update_when: Literal["low", "high"], seed: int, step: int
) -> Tensor:
    """Choose a fraction `rate` of a batch's images to train on, at least one. Returns [b] int64, ascending.

    contributions: [B], z_i . s, what image i adds to |s|^2, which is their mean. quantile: those that add least (low)
    or most (high), the batch's own quantile as the reference; random: any, the control.
    """
    num = max(1, round(rate * len(contributions)))
    if rule == "random":
        numbers = uniform_array(seed, step, np.arange(len(contributions), dtype=np.uint64))
        order = torch.from_numpy(np.argsort(numbers, kind="stable")).to(contributions.device)
    else:
        order = contributions.argsort(descending=update_when == "high", stable=True)
    return order[:num].sort().values


def _decide(rule: GateRule, state: GateState, m: float, magnitudes: Sequence[float]) -> bool:
    if rule.rule == "none" or rule.unit == "image":
        return True
    if rule.rule == "random":
        return uniform(rule.seed, state.step) < rule.rate
    if rule.rule == "alternate":
        # the number of updates so far is kept at ceil(rate * steps), starting with an update
        return math.ceil((state.step + 1) * rule.rate) > math.ceil(state.step * rule.rate)
    reference = magnitudes[2] if rule.rule == "views" else state.reference
    m = magnitudes[1] if rule.rule == "views" else m
    if reference is None:  # nothing but non-finite statistics so far
        return True
    return m <= reference if rule.update_when == "low" else m >= reference


def _update_reference(rule: GateRule, state: GateState, m: float, decided: bool | None) -> GateState:
    """Return the state with the reference that follows m. decided: the rule's decision; None if it made none."""
    if rule.unit == "image":
        return state
    if rule.rule == "median":
        window = (*state.window, m)[-_WINDOW:]
        return replace(state, window=window, reference=statistics.median(window))
    reference = state.reference
    if rule.rule == "quantile":
        return replace(_track_quantile(rule, state, m, decided), window=(m,))
    if reference is None or rule.rule == "prev":
        return replace(state, reference=m)
    if rule.rule == "ema":
        return replace(state, reference=rule.beta * reference + (1 - rule.beta) * m)
    return state


def _track_quantile(rule: GateRule, state: GateState, m: float, decided: bool | None) -> GateState:
    """Return the state with the next threshold of the quantile rule (formulas above)."""
    reference, spread, debt = state.reference, state.spread, state.debt
    if reference is None:
        return replace(state, reference=m)
    if state.window:
        change = abs(m - state.window[0])
        spread = change if spread == 0 else 0.9 * spread + 0.1 * change
    if decided is not None:
        debt = min(max(debt + decided - rule.rate, -1 / _CATCH_UP), 1 / _CATCH_UP)
    below, sign = (rule.rate, 1) if rule.update_when == "low" else (1 - rule.rate, -1)
    reference += spread * (_STEP * (below - (m < reference)) - sign * _CATCH_UP * debt)
    return replace(state, reference=reference, spread=spread, debt=debt)
