"""Sinkhorn-Knopp targets: soft assignments of samples to centres that use every centre alike (SwAV, Caron et al. 2020).

    Q = exp(scores / epsilon), then `iterations` times
        centre step:  every column scaled to sum to B / K
        sample step:  every row scaled to sum to 1                              B samples, K centres

The sample step is last: rows sum to 1, columns to B / K only as far as the iterations have converged (the lower
epsilon, the more of them it takes). SwAV's division by the total cancels in the first centre step.

Only a column's scaling is carried from one iteration to the next; a row's is the normaliser of a softmax:
    t = (scores - peak) / epsilon + share       peak [K]: the column's largest score, which it has at share 0
    first:   share  = -log sum_b exp((scores - peak) / epsilon)
    again:   share -=  log sum_b softmax_k(t)                                   iterations - 1 times
    last:    Q      =  softmax_k(t)
So nothing overflows at any epsilon, and the rounding of large scores / epsilon never enters.

Bytes moved: (iterations + 1) reads of the scores and one write of Q in fp32. Eager moves 3 x 4 BK bytes for every
step of every iteration. No gradient: targets are constants of the loss.
Split over ranks, only peak and the [K] sums are reduced between them: 1 + iterations reductions of K floats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import NAMESPACE

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sinkhorn_reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The specification, in the log domain, in fp32 or wider. Arguments as `sinkhorn`."""
    log_q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    for _ in range(iterations - 1):
        log_q = log_q.log_softmax(0).log_softmax(1)
    return log_q.log_softmax(0).softmax(1)


def _columns_reference(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    if not len(scores):
        return scores.new_full((scores.shape[1],), -math.inf, dtype=torch.float32), _zeros(scores)
    peak = scores.float().amax(0)
    return peak, ((scores.float() - peak) / epsilon).exp().sum(0)


def _assign_reference(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    return ((scores.float() - peak) / epsilon + share).softmax(1)


def _rows_reference(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    return _assign_reference(scores, epsilon, peak, share).sum(0)


def _zeros(scores: Tensor) -> Tensor:
    return scores.new_zeros(scores.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn", mutates_args=())
def _sinkhorn_op(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return sinkhorn_reference(scores, epsilon, iterations)


@_sinkhorn_op.register_fake
def _(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Targets Q of samples against centres; every row sums to 1 within 1e-6. No gradient flows to `scores`.

    scores: [B, K] in fp16, bf16 or fp32, any strides; B may be 0. epsilon: above 0; SwAV's is 0.05, for cosines.
    iterations: at least 1, since the rows sum to 1 only after a sample step; SwAV's is 3.
    Returns [B, K] in fp32. A NaN among the scores makes every target NaN.
    Raises ValueError for arguments that do not fit.
    """
    if message := _complaint(scores, epsilon, iterations):
        raise ValueError(f"sinkhorn: {message}")
    return _sinkhorn_op(scores.detach(), float(epsilon), int(iterations))


def _complaint(scores: Tensor, epsilon: float, iterations: int) -> str | None:
    if scores.dim() != 2 or scores.shape[1] == 0:
        return f"scores must be [samples, centres] with at least one centre, got shape {list(scores.shape)}"
    if scores.dtype not in _DTYPES:
        return f"scores must be fp16, bf16 or fp32, got {scores.dtype}"
    if not 0 < epsilon < math.inf:
        return f"epsilon must be a finite number above 0, got {epsilon}"
    if iterations < 1:
        return f"iterations must be at least 1, got {iterations}"
    return None
