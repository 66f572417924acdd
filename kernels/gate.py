"""Gate on the device: update or skip this step, decided from the center vector.

    m       |s|, the magnitude of the batch's mean unit embedding
    open    m <= reference where update_when is "low", m >= reference where it is "high"; always on the first step
            and on the step after `max_skips` skipped in a row; never when m is not finite
    rule    reference
    none    none: always update
    prev    m of the step before
    ema     beta * reference + (1 - beta) * m
    quantile  reference + spread (.5 (p - [m < reference]) - .05 debt), p = rate, direction low (high: 1 - rate, + debt)
              spread: running mean, .9, of |m - m before|; debt: update steps beyond `rate` so far, at most 20,
              of those that the rule decided itself
    views   m of the second view, compared with m of the first
    s_bar   center_beta * s_bar + (1 - center_beta) * s, the running center

The first finite m and s replace reference and s_bar; those that are not finite are counted and change neither.
Meaning and evidence of the rules: METHODS 1.6 (our readings; the paper's rule is not published).

The state is one float64 vector, [HEAD + d]: the cells of CELLS, then s_bar. float64, so that a step counter never
stalls and the decision equals the host's on the same m. One tensor, so that a captured graph carries a step over with
one copy. `ticket` is the CUDA kernel's scratch, 0 between launches: a state is used by one step at a time.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ._native import extension

RULES = ("none", "prev", "ema", "quantile", "views")
DIRECTIONS = ("low", "high")
# fmt: off
CELLS = (
    "step", "open", "finite", "magnitude", "unbiased_square", "reference", "spread", "debt", "opened", "skips",
    "view_1", "view_2", "ticket",
)
# fmt: on
HEAD = len(CELLS)
STEP, CATCH_UP = 0.5, 0.05  # of the quantile's threshold, in units of the spread
_REFERENCE = CELLS.index("reference")


def new_gate_state(d: int, device: torch.device | str | None = None) -> Tensor:
    """Return the state before the first step, float64 [HEAD + d], for embeddings of width d."""
    state = torch.zeros(HEAD + d, dtype=torch.float64, device=device)
    state[_REFERENCE] = torch.nan  # none yet
    return state


def gate_values(state: Tensor) -> dict[str, float]:
    """Return the cells by name, as Python numbers; waits for the device.

    step: number of the last step, from 1; open, finite: 1 or 0; magnitude: m; unbiased_square: (B m^2 - mean_i
    |z_bar_i|^2) / (B - 1), free of the batch size's bias (METHODS 1.2), NaN for one image; opened: update steps so far;
    skips: in a row; view_1, view_2: m of each view.
    """
    return dict(zip(CELLS, state[:HEAD].tolist(), strict=True))


def new_gate_flag(device: torch.device | str | None = None) -> Any:
    """Return a GateFlag: host memory into which the op writes (step, open), and `wait(step, timeout)` that reads it.

    device: where the op will run; the memory is pinned for "cuda". Pass `flag.address` to the op and keep the flag
    alive as long as a kernel or a captured graph may write it. Raises RuntimeError where _C was not built.
    """
    pinned = device is not None and torch.device(device).type == "cuda"
    return extension().GateFlag(torch.zeros(1, dtype=torch.int64, pin_memory=pinned))


def write_flag(address: int, state: Tensor) -> None:
    """Write the state's decision at `address`, as a compiled op does."""
    step, is_open, is_finite = (int(cell) for cell in state[:3].tolist())
    ctypes.c_int64.from_address(address).value = step << 2 | is_finite << 1 | is_open


def finish_reference(
    sums: Tensor,
    state: Tensor,
    *,
    num_views: int = 1,
    rule: str = "ema",
    update_when: str = "low",
    beta: float = 0.9,
    rate: float = 0.5,
    max_skips: int = 16,
    center_beta: float = 0.9,
) -> tuple[Tensor, Tensor]:
    """Compute a batch's center [d] and the next state from its sums: the specification, without a host sync."""
    # lizard forgives: long, as the five rules share their intermediate values
    num_images, square = sums[-1], sums[-2] / sums[-1]
    centers = sums[:-2].view(num_views, -1) / num_images
    s = centers.mean(0)
    with torch.no_grad():
        m, of_views = s.norm(), centers.norm(dim=1)
        unbiased = torch.where(num_images > 1, (num_images * m * m - square) / (num_images - 1), torch.nan)
        view_1, view_2 = (of_views[0], of_views[1]) if num_views == 2 else (of_views[0], torch.zeros_like(m))
        old = dict(zip(CELLS, state[:HEAD].unbind(), strict=True))
        ref = old["reference"]
        first, finite = ref.isnan(), m.isfinite() & view_1.isfinite() & view_2.isfinite()

        left, right = (view_1, view_2) if rule == "views" else (m, ref)
        passes = left <= right if update_when == "low" else left >= right
        passes |= (right.isnan()) | (rule == "none")
        forced = (old["step"] == 0) | (old["skips"] >= max_skips)
        is_open = finite & (forced | passes)

        spread, debt, next_ref = old["spread"], old["debt"], ref
        if rule == "prev":
            next_ref = m
        elif rule == "ema":
            next_ref = beta * ref + (1 - beta) * m
        elif rule == "quantile":
            known, moved = finite & ~first, (m - old["magnitude"]).abs()
            moved = torch.where(spread == 0, moved, 0.9 * spread + 0.1 * moved)
            spread = torch.where(known & (old["finite"] != 0), moved, spread)
            debt = torch.where(known & ~forced, (debt + is_open - rate).clamp(-1 / CATCH_UP, 1 / CATCH_UP), debt)
            below, owed = (rate, debt) if update_when == "low" else (1 - rate, -debt)
            next_ref = ref + spread * (STEP * (below - (m < ref).double()) - CATCH_UP * owed)
        next_ref = torch.where(finite, torch.where(first, m, next_ref), ref)

        running = state[HEAD:]
        moved_center = torch.where(first, s, center_beta * running + (1 - center_beta) * s)
        skips = torch.where(is_open, 0.0, old["skips"] + 1)
        cells = [old["step"] + 1, is_open, finite, m, unbiased, next_ref, spread, debt, old["opened"] + is_open, skips]
        head = torch.stack([cell.double() for cell in (*cells, view_1, view_2, torch.zeros_like(m))])
        return s, torch.cat([head, torch.where(finite, moved_center, running)])


def gate_numbers(rule: str, update_when: str, *numbers: float | int) -> tuple[float | int, ...]:
    """Return the gate's arguments as the compiled ops take them."""
    return RULES.index(rule), update_when == "low", *numbers


def validate_gate(
    op: str, like: Tensor, state: Tensor, d: int, num_views: int, rule: str, update_when: str, beta: float, rate: float,
    max_skips: int, center_beta: float, flag: int,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of `op` that do not fit; like: a tensor on the device of the step."""
    if reason := _unsupported_state(like, state, d) or _unsupported_options(
        num_views, rule, update_when, beta, rate, max_skips, center_beta, flag
    ):
        raise ValueError(f"{op}: {reason}")


def _unsupported_state(like: Tensor, state: Tensor, d: int) -> str | None:
    if state.shape != (HEAD + d,) or state.dtype != torch.float64 or state.device != like.device:
        got = f"{state.dtype} {list(state.shape)} on {state.device}"
        return f"state must be float64 [{HEAD + d}] on {like.device} (gate.new_gate_state makes one), got {got}"
    return None


def _unsupported_options(
    num_views: int, rule: str, update_when: str, beta: float, rate: float, max_skips: int, center_beta: float, flag: int
) -> str | None:
    if rule not in RULES or (rule == "views" and num_views != 2):
        return f"rule must be one of {', '.join(RULES)} (views: with num_views=2), got {rule!r} with {num_views=}"
    if update_when not in DIRECTIONS:
        return f"update_when must be one of {', '.join(DIRECTIONS)}, got {update_when!r}"
    for name, value in (("beta", beta), ("rate", rate), ("center_beta", center_beta)):
        if not 0 <= value <= 1:
            return f"{name} must be from 0 to 1, got {value}"
    if max_skips < 0 or flag < 0:
        return f"max_skips and flag must not be negative, got {max_skips} and {flag}"
    return None
