"""Sinkhorn-Knopp targets: soft assignments of samples to centres that use all centres alike (SwAV, Caron et al. 2020).

    Q = exp(scores / epsilon), then `iterations` times
        centre step:  every column scaled to sum to B / K
        sample step:  every row scaled to sum to 1                              B samples, K centres

The sample step is last: rows sum to 1, columns to B / K only as far as the iterations have converged (a lower
epsilon takes more of them). SwAV's division by the total cancels in the first centre step.

Only the columns' scaling is carried from one iteration to the next; a row's is the normaliser of a softmax:
    t = (scores - peak) / epsilon + share                           peak [K]: the largest score of a column
    first    share  = -log sum_b exp((scores - peak) / epsilon)
    again    share -=  log sum_b softmax_k(t)                       iterations - 1 times
    last     Q      =  softmax_k(t)
Nothing overflows at any epsilon, and a column's best samples keep all their digits.

Split over ranks, the [K] peaks and sums are reduced between them and nothing else: 1 + iterations reductions.
Bytes moved: iterations + 1 reads of the scores and one write of Q in fp32 (above BLOCK centres, twice the reads).
One launch: a grid small enough to be resident runs all passes, with a barrier between them. No gradient.
Several problems of one shape, scores [V, B, K], share the launch, and over ranks the reductions.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._dispatch import NAMESPACE, choose, triton_unsupported_reason
from . import triton as fused

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sinkhorn_reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The specification, in fp32 or wider. Arguments as `sinkhorn`."""
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


def _register(schema: str, fake: Callable, in_triton: Callable, in_torch: Callable) -> Callable:
    def run(scores: Tensor, *rest):
        if not scores.numel():  # a rank without rows
            return in_torch(scores, *rest)
        kind = choose("sinkhorn", scores.device, {"triton": triton_unsupported_reason(scores), "reference": None})
        return (in_triton if kind == "triton" else in_torch)(scores, *rest)

    # not custom_op: the wrappers that make it differentiable take 13 us a call on the host
    name = schema.split("(")[0]
    torch.library.define(f"{NAMESPACE}::{name}", schema.removeprefix(name))
    torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_sinkhorn_op = _register(
    "sinkhorn(Tensor scores, float epsilon, int iterations) -> Tensor",
    fused.like_scores, fused.assignments, sinkhorn_reference,
)  # fmt: skip
_columns_op = _register(
    "sinkhorn_columns(Tensor scores, float epsilon) -> (Tensor, Tensor)",
    fused.two_columns, fused.columns, _columns_reference,
)  # fmt: skip
_rows_op = _register(
    "sinkhorn_rows(Tensor scores, float epsilon, Tensor peak, Tensor share) -> Tensor",
    lambda scores, epsilon, peak, share: torch.empty_like(peak), fused.rows, _rows_reference,
)  # fmt: skip
_assign_op = _register(
    "sinkhorn_assign(Tensor scores, float epsilon, Tensor peak, Tensor share) -> Tensor",
    fused.like_scores, fused.assign, _assign_reference,
)  # fmt: skip


def sinkhorn(
    scores: Tensor, epsilon: float, iterations: int, *, all_reduce: Callable[[Tensor, str], None] | None = None
) -> Tensor:
    """Targets Q of samples against centres; every row sums to 1 within 1e-6. No gradient flows to `scores`.

    scores: [B, K], or [V, B, K] for V problems apart (views, say), in fp16, bf16 or fp32, any strides; B may be 0.
    epsilon: above 0; SwAV's is 0.05, for cosines.
    iterations: at least 1, since the rows sum to 1 only after a sample step; SwAV's is 3.
    all_reduce: for a batch split over ranks, of which `scores` are this rank's rows: reduces a [K] or [V, K] tensor
        over the ranks in place by "max" or "sum". Called 1 + `iterations` times, by every rank, one without rows too.
    Returns fp32 of the shape of `scores`, contiguous. A NaN among a problem's scores makes all its targets NaN.
    Raises ValueError for arguments that do not fit.
    """
    if message := _complaint(scores, epsilon, iterations):
        raise ValueError(f"sinkhorn: {message}")
    scores, epsilon = scores.detach(), float(epsilon)
    if all_reduce is None:
        return _sinkhorn_op(scores, epsilon, iterations)
    own_peak, total = _columns_op(scores, epsilon)
    peak = own_peak.clone()
    all_reduce(peak, "max")
    total = total * ((own_peak - peak) / epsilon).exp()
    all_reduce(total, "sum")
    share = -total.log()
    for _ in range(iterations - 1):
        total = _rows_op(scores, epsilon, peak, share)
        all_reduce(total, "sum")
        share = share - total.log()
    return _assign_op(scores, epsilon, peak, share)


def _complaint(scores: Tensor, epsilon: float, iterations: int) -> str | None:
    if scores.dim() not in (2, 3) or scores.shape[-1] == 0:
        shapes = "[samples, centres] or [problems, samples, centres]"
        return f"scores must be {shapes} with at least one centre, got shape {list(scores.shape)}"
    if scores.dtype not in _DTYPES:
        return f"scores must be fp16, bf16 or fp32, got {scores.dtype}"
    return argument_complaint(epsilon, iterations)


def argument_complaint(epsilon: float, iterations: int) -> str | None:
    """What is wrong with the numbers, or None."""
    if not 0 < epsilon < math.inf:
        return f"epsilon must be a finite number above 0, got {epsilon}"
    if iterations < 1:
        return f"iterations must be at least 1 (a sample step makes the rows sum to 1), got {iterations}"
    return None
