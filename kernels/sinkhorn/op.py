"""Sinkhorn-Knopp targets: soft assignments of samples to centers that use all centers equally (SwAV, Caron 2020).

    Q = exp(scores / epsilon), then `iterations` times
        center step:  every column scaled to sum to B / K
        sample step:  every row scaled to sum to 1                              B samples, K centers

The sample step is last: rows sum to 1, columns to B / K only as far as the iterations have converged (a lower
epsilon takes more of them). SwAV's division by the total cancels in the first center step.

Only the columns' scaling is carried from one iteration to the next; a row's is the normalizer of a softmax:
    t = (scores - peak) / epsilon + share                           peak [K]: the largest score of a column
    first    share  = -log sum_b exp((scores - peak) / epsilon)
    again    share -=  log sum_b softmax_k(t)                       iterations - 1 times
    last     Q      =  softmax_k(t)
Nothing overflows at any epsilon, and a column's best samples keep all their digits.

Split over ranks, the [K] peaks and sums are reduced between them and nothing else: 1 + iterations reductions.
Bytes moved: iterations + 1 reads of the scores and one write of Q in fp32 (above BLOCK centers, twice the reads).
One launch: a grid small enough to be resident runs all passes, with a barrier between them. No gradient.
Several problems of one shape, scores [V, B, K], share the launch, and over ranks the reductions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._define import define
from .._dispatch import choose, triton_unsupported_reason
from . import triton

MAX_ITERATIONS = 100_000
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sinkhorn_reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Compute the specification of `sinkhorn` (its arguments) in fp32 or wider."""
    t, _ = _below_peak(scores, epsilon)
    share = -t.exp().sum(-2, keepdim=True).log()
    for _ in range(iterations - 1):
        share = share - (t + share).softmax(-1).sum(-2, keepdim=True).log()
    return (t + share).softmax(-1)


def _below_peak(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    x = scores.to(torch.promote_types(scores.dtype, torch.float32))
    peak = x.amax(-2, keepdim=True) if x.numel() else x.new_full((*x.shape[:-2], 1, x.shape[-1]), -math.inf)
    return (x - peak) / epsilon, peak.squeeze(-2)


def _columns_reference(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    t, peak = _below_peak(scores, epsilon)
    return peak, t.exp().sum(-2)


def _assign_reference(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    return ((scores.float() - peak.unsqueeze(-2)) / epsilon + share.unsqueeze(-2)).softmax(-1)


def _rows_reference(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    return _assign_reference(scores, epsilon, peak, share).sum(-2)


def _register(
    schema: str, fake: Callable[..., Any], in_triton: Callable[..., Any], in_torch: Callable[..., Any]
) -> Callable[..., Any]:
    """Define and implement the op of `schema` with a fake and both forms; returns its default overload."""

    def run(scores: Tensor, *rest: Any) -> Any:
        if not scores.numel():  # a rank without rows
            return in_torch(scores, *rest)
        kind = choose("sinkhorn", scores.device, {"triton": triton_unsupported_reason(scores), "reference": None})
        return (in_triton if kind == "triton" else in_torch)(scores, *rest)

    return define(schema, run, fake)


_sinkhorn_op = _register(
    "sinkhorn(Tensor scores, float epsilon, int iterations) -> Tensor",
    triton.like_scores, triton.assignments, sinkhorn_reference,
)  # fmt: skip
_columns_op = _register(
    "sinkhorn_columns(Tensor scores, float epsilon) -> (Tensor, Tensor)",
    triton.two_columns, triton.columns, _columns_reference,
)  # fmt: skip
_rows_op = _register(
    "sinkhorn_rows(Tensor scores, float epsilon, Tensor peak, Tensor share) -> Tensor",
    lambda scores, epsilon, peak, share: torch.empty_like(peak), triton.rows, _rows_reference,
)  # fmt: skip
_assign_op = _register(
    "sinkhorn_assign(Tensor scores, float epsilon, Tensor peak, Tensor share) -> Tensor",
    triton.like_scores, triton.assign, _assign_reference,
)  # fmt: skip


def _unsupported_scores(scores: Tensor) -> str | None:
    if scores.dim() not in (2, 3) or scores.shape[-1] == 0:
        shapes = "[samples, centers] or [problems, samples, centers]"
        return f"scores must be {shapes} with at least one center, got shape {list(scores.shape)}"
    if scores.dtype not in _DTYPES:
        return f"scores must be fp16, bf16 or fp32, got {scores.dtype}"
    return None


def unsupported_numbers(epsilon: float, iterations: int) -> str | None:
    """Return why Sinkhorn cannot run with these numbers, or None."""
    if not 0 < epsilon < math.inf:
        return f"epsilon must be a finite number above 0, got {epsilon}"
    if not 1 <= iterations <= MAX_ITERATIONS:
        bound = "at least 1 (a sample step makes the rows sum to 1)" if iterations < 1 else f"at most {MAX_ITERATIONS}"
        return f"iterations must be {bound}, got {iterations}"
    return None


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, *, all_reduce: Callable[[Tensor, str], object] | None = None
) -> Tensor:
    """Compute targets Q of samples against centers; every row sums to 1 within 1e-6. No gradient flows to `scores`.

    scores: [B, K], or [V, B, K] for V separate problems (views, say), in fp16, bf16 or fp32, any strides; B may be 0.
    epsilon: above 0; SwAV's is 0.05, for cosines.
    iterations: at least 1, since the rows sum to 1 only after a sample step; SwAV's is 3.
    all_reduce: for a batch split over ranks, of which `scores` are this rank's rows: reduces a [K] or [V, K] tensor
        over the ranks in place by "max" or "sum". Called 1 + `iterations` times, by every rank, one without rows too.
    Returns fp32 of the shape of `scores`, contiguous. A NaN among a problem's scores makes all its targets NaN.
    Raises ValueError for arguments that do not fit.
    """
    if reason := _unsupported_scores(scores) or unsupported_numbers(epsilon, iterations):
        raise ValueError(f"sinkhorn: {reason}")
    scores, epsilon = scores.detach(), float(epsilon)
    if all_reduce is None:
        return _sinkhorn_op(scores, epsilon, iterations)
    local_peak, total = _columns_op(scores, epsilon)
    peak = local_peak.clone()
    all_reduce(peak, "max")
    total = total * ((local_peak - peak) / epsilon).exp()
    all_reduce(total, "sum")
    share = -total.log()
    for _ in range(iterations - 1):
        total = _rows_op(scores, epsilon, peak, share)
        all_reduce(total, "sum")
        share = share - total.log()
    return _assign_op(scores, epsilon, peak, share)
