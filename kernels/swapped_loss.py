"""Cross-entropy of scores against soft targets: the term of SwAV's swapped loss (Caron et al. 2020, eq. 2).

    e = exp((scores - peak) / temperature)      peak [B]: the largest score of a row
    m = sum_k q                                 q: targets, no gradient
    loss = mean_b (m log sum_k e + sum_k q (peak - scores) / temperature)
    d loss / d scores = (weight e - q) / (temperature B)        weight [B] = m / sum_k e

B samples, K centers. Rows of q may have any sum m: for V views, the mean targets of the other views in one call,
    swapped_cross_entropy(scores.flatten(0, 1), ((q.sum(0) - q) / (V - 1)).flatten(0, 1), temperature)

Saved for backward: scores, targets, and peak and weight [B] in fp32; never the log-probabilities. (A single
log-sum-exp in their place would cost the gradient a digit: it is large where the probabilities matter.)
Bytes moved: one read of scores and targets forward; these and one write of the gradient backward. Eager writes and
reads again the scaled scores, the log-probabilities, their product with q, and the gradients of those.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._dispatch import NAMESPACE, choose, triton_unsupported_reason
from ._tile_sizes import tile
from ._transforms import is_transformed
from ._triton import cdiv, on_device_of, tl, triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def swapped_cross_entropy_reference(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute the specification of `swapped_cross_entropy` in fp32 or wider; differentiable in both tensors."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    log_p = (scores.to(wide) / temperature).log_softmax(1)
    return -(targets.to(wide) * log_p).sum(1).mean()


def _forward_reference(scores: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    x, q = scores.float(), targets.float()
    peak = x.amax(1)
    below = (x - peak[:, None]) / temperature
    total, mass = below.exp().sum(1), q.sum(1)
    return mass * total.log() - (q * below).sum(1), peak, mass / total


def _backward_reference(
    grad: Tensor, scores: Tensor, targets: Tensor, peak: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    e = ((scores.float() - peak[:, None]) / temperature).exp()
    gradient = (weight[:, None] * e - targets.float()) * (grad / temperature)[:, None]
    return gradient.to(scores.dtype).contiguous()


@triton.jit
def _load(matrix, i, j, mask, stride_i, stride_j, other):
    return tl.load(matrix + i * stride_i + j * stride_j, mask, other=other).to(tl.float32)


@triton.jit
def _forward_kernel(
    scores, targets, loss, peak, weight,
    inverse,  # log2(e) / temperature
    B, K, stride_sb, stride_sk, stride_tb, stride_tk,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    # below any score, yet finite: -inf - -inf would be NaN
    top = tl.full((BLOCK_B,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_B,), tl.float32)
    mass = tl.zeros((BLOCK_B,), tl.float32)
    gap = tl.zeros((BLOCK_B,), tl.float32)  # sum q (top - scores)
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (b < B)[:, None] & (k < K)[None, :]
        i, j = b.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
        x = _load(scores, i, j, mask, stride_sb, stride_sk, float("-inf"))
        q = _load(targets, i, j, mask, stride_tb, stride_tk, 0.0)
        higher = tl.maximum(top, tl.max(x, 1))
        gap += mass * (higher - top) + tl.sum(tl.where(mask, q * (higher[:, None] - x), 0.0), 1)
        total = total * tl.exp2((top - higher) * inverse) + tl.sum(tl.exp2((x - higher[:, None]) * inverse), 1)
        # not `mass += ...`: Triton 3.6's OptimizeThreadLocality fails where such a sum is read twice after its loop
        mass = tl.where(b < B, mass + tl.sum(q, 1), 0.0)
        top = higher
    # powers of two throughout; ln 2 takes them back
    tl.store(loss + b, (gap * inverse + mass * tl.log2(total)) * 0.6931471805599453, mask=b < B)
    tl.store(peak + b, top, mask=b < B)
    tl.store(weight + b, mass / total, mask=b < B)


@triton.jit
def _backward_kernel(
    grad, scores, targets, peak, weight, grad_scores,
    inverse, inverse_temperature,
    B, K, stride_g, stride_sb, stride_sk, stride_tb, stride_tk,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (b < B)[:, None] & (k < K)[None, :]
    i, j = b.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
    x = _load(scores, i, j, mask, stride_sb, stride_sk, 0.0)
    q = _load(targets, i, j, mask, stride_tb, stride_tk, 0.0)
    b_peak = tl.load(peak + b, mask=b < B, other=0.0)
    b_weight = tl.load(weight + b, mask=b < B, other=0.0)
    b_grad = tl.load(grad + b.to(tl.int64) * stride_g, mask=b < B, other=0.0) * inverse_temperature
    out = (b_weight[:, None] * tl.exp2((x - b_peak[:, None]) * inverse) - q) * b_grad[:, None]
    tl.store(grad_scores + i * K + j, out.to(grad_scores.dtype.element_ty), mask=mask)


def _blocks(scores: Tensor) -> dict[str, int]:
    block = tile("swapped_cross_entropy", scores.device)["BLOCK"]
    B, K = scores.shape
    block_k = min(triton.next_power_of_2(K), block)
    block_b = min(block // block_k, triton.next_power_of_2(max(B, 1)))
    return {"BLOCK_B": block_b, "BLOCK_K": block_k, "num_warps": min(max(block_b * block_k // 512, 1), 8)}


def _forward_triton(scores: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    B, K = scores.shape
    loss, peak, weight = (scores.new_empty(B, dtype=torch.float32) for _ in range(3))
    blocks = _blocks(scores)
    with on_device_of(scores):
        _forward_kernel[(cdiv(B, blocks["BLOCK_B"]),)](
            scores, targets, loss, peak, weight, math.log2(math.e) / temperature, B, K,
            *scores.stride(), *targets.stride(), enable_fp_fusion=True, **blocks,
        )  # fmt: skip
    return loss, peak, weight


def _backward_triton(
    grad: Tensor, scores: Tensor, targets: Tensor, peak: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    B, K = scores.shape
    grad_scores = scores.new_empty(B, K)
    blocks = _blocks(scores)
    with on_device_of(scores):
        _backward_kernel[(cdiv(B, blocks["BLOCK_B"]), cdiv(K, blocks["BLOCK_K"]))](
            grad, scores, targets, peak, weight, grad_scores, math.log2(math.e) / temperature, 1 / temperature, B, K,
            grad.stride(0), *scores.stride(), *targets.stride(), enable_fp_fusion=True, **blocks,
        )  # fmt: skip
    return grad_scores


def _use_triton(scores: Tensor) -> bool:
    candidates = {"triton": triton_unsupported_reason(scores), "reference": None}
    return choose("swapped_cross_entropy", scores.device, candidates) == "triton"


@torch.library.custom_op(f"{NAMESPACE}::swapped_cross_entropy", mutates_args=())
def _op(scores: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss of each row, peak, weight), each [B] in fp32; the gradient reaches `scores` from the first."""
    return (_forward_triton if _use_triton(scores) else _forward_reference)(scores, targets, temperature)


@torch.library.custom_op(f"{NAMESPACE}::swapped_cross_entropy_backward", mutates_args=())
def _backward_op(
    grad: Tensor, scores: Tensor, targets: Tensor, peak: Tensor, weight: Tensor, temperature: float
) -> Tensor:
    run = _backward_triton if _use_triton(scores) else _backward_reference
    return run(grad, scores, targets, peak, weight, temperature)


@_op.register_fake
def _(scores: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    loss, peak, weight = (scores.new_empty(scores.shape[0], dtype=torch.float32) for _ in range(3))
    return loss, peak, weight


@_backward_op.register_fake
def _(grad: Tensor, scores: Tensor, targets: Tensor, peak: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    scores, targets, ctx.temperature = inputs
    _, peak, weight = output
    ctx.save_for_backward(scores, targets, peak, weight)
    ctx.mark_non_differentiable(peak, weight)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.temperature), None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _unsupported_reason(scores: Tensor, targets: Tensor, temperature: float) -> str | None:
    if scores.dim() != 2 or scores.numel() == 0:
        return f"scores must be [samples, centers], at least one of each, got shape {list(scores.shape)}"
    if targets.shape != scores.shape:
        return f"targets must have the shape of scores, {list(scores.shape)}, got {list(targets.shape)}"
    for name, t in (("scores", scores), ("targets", targets)):
        if t.dtype not in _DTYPES:
            return f"{name} must be fp16, bf16 or fp32, got {t.dtype}"
    if targets.device != scores.device:
        return f"targets must be on the device of scores, {scores.device}, got {targets.device}"
    if not 0 < temperature < math.inf:
        return f"temperature must be a finite number above 0, got {temperature}"
    return None


def swapped_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute mean_b -sum_k targets log softmax(scores / temperature), a scalar in fp32; gradient for `scores` alone.

    scores: [B, K] in fp16, bf16 or fp32, B at least 1; targets: [B, K] in any of them, rows of any sum; any strides.
    temperature: above 0; SwAV's is 0.1. The gradient has the dtype of `scores`.
    Raises ValueError for arguments that do not fit.
    """
    if reason := _unsupported_reason(scores, targets, temperature):
        raise ValueError(f"swapped_cross_entropy: {reason}")
    if is_transformed("swapped_cross_entropy", scores):
        return swapped_cross_entropy_reference(scores, targets.detach(), float(temperature))
    return _op(scores, targets.detach(), float(temperature))[0].mean()
