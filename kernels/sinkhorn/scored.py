"""Scores of samples against centers and their Sinkhorn targets, in one launch where the product is small.

    scores = z c^T                              [B, K], fp32
    Q = sinkhorn(scores, epsilon, iterations)   [B, K], fp32, no gradient

B samples, K centers, D width. Backward: dz = G c, dc = G^T z for the gradient G of the scores.

Forms: `fused`: the first pass of Sinkhorn computes the scores by tiles, stores them once and takes the columns' parts
from the tile; `apart`: the library's product, then `sinkhorn`. On a GPU the faster by measurement runs: the product of
a small problem is launch-bound, that of a large one is faster in the library.

The scores are stored because the loss and its backward read them. Computed again in each pass they would cost
2 D flops a score and pass where reading one costs 4 bytes: at D = 128 the flops take longer on any GPU, in fp32.
Bytes moved by `fused`: z and c in (c once for every 16 or 64 rows, from L2), the scores out once and in `iterations`
times, Q out: one read of the scores and one launch fewer than `apart`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autotune import autotune, power_class
from .._dispatch import NAMESPACE, choose, record, requested, triton_unsupported_reason
from .._tile_sizes import tile
from .._transforms import is_transformed
from .._triton import INTERPRET, cdiv, on_device_of, tl, triton
from .op import sinkhorn, sinkhorn_reference, unsupported_numbers
from .triton import after_first_pass, launch, like_scores, partition, pass_names, room_for_rows, two_columns
from .triton_kernels import scores_pass

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scored_sinkhorn_reference(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Compute the specification of `scored_sinkhorn` in fp32 or wider; the scores are differentiable by autograd."""
    wide = torch.promote_types(z.dtype, torch.float32)
    scores = z.to(wide) @ centers.to(wide).T
    return scores, sinkhorn_reference(scores.detach(), epsilon, iterations)


@triton.jit
def _scored_kernel(
    z, c, scores, q, part_peak, part_sum, rows, peak, share, arrived,
    inverse,  # log2(e) / epsilon
    iterations, num_first, num_parts, B, K, D, stride_zb, stride_zd, stride_ck, stride_cd,
    ONE_LAUNCH: tl.constexpr,  # else the scores and the columns' parts alone
    FITS: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the scores and the columns' parts by tiles; ONE_LAUNCH: then all passes of Sinkhorn."""
    scores_pass(
        z, c, scores, part_peak, part_sum, inverse, B, K, D, stride_zb, stride_zd, stride_ck, stride_cd,
        UPCAST_DOT, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if ONE_LAUNCH:
        after_first_pass(
            scores, q, part_peak, part_sum, rows, peak, share, arrived,
            inverse, iterations, num_first, num_parts, B, K, K, 1,
            FITS, BLOCK_B, BLOCK_K, BLOCK_P, BLOCK_C,
        )  # fmt: skip


def _fused(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    (B, D), K = z.shape, len(centers)
    tiles = tile("scored_sinkhorn_fp32" if z.dtype == torch.float32 else "scored_sinkhorn", z.device)
    scores = z.new_empty(B, K, dtype=torch.float32)
    q, (peak, share) = like_scores(scores), two_columns(scores)
    # smaller blocks of rows while large ones would leave processors idle
    block_m = tiles["FEW_ROWS" if len(z) < tiles["MANY_ROWS"] else "BLOCK_M"]
    num_first = cdiv(B, block_m)
    by = partition(scores, tiles=num_first * cdiv(K, tiles["BLOCK_N"]), fewest_warps=4)
    part_peak = scores.new_empty(num_first, K)
    part_sum = scores.new_empty(max(num_first, by.num_parts), K)
    arrived = scores.new_zeros(1, dtype=torch.int32)
    # programs run in turn in the interpreter, where none may wait for the next
    one_launch = not INTERPRET
    with on_device_of(z):
        _scored_kernel[(by.num_parts,)](
            z, centers, scores, q, part_peak, part_sum, room_for_rows(scores, by, peak), peak, share, arrived,
            math.log2(math.e) / epsilon, iterations, num_first, by.num_parts, B, K, D, *z.stride(), *centers.stride(),
            ONE_LAUNCH=one_launch, FITS=by.block_k >= K, UPCAST_DOT=INTERPRET,
            BLOCK_M=block_m, BLOCK_N=tiles["BLOCK_N"], BLOCK_D=tiles["BLOCK_D"],
            launch_cooperative_grid=one_launch, **by.options,
        )  # fmt: skip
    if not one_launch:
        launch(pass_names(iterations)[1:], scores, epsilon, peak, share, q=q, by=by, parts=(part_peak, part_sum))
    return scores, q


def _apart(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    scores = z.float() @ centers.float().T
    return scores, sinkhorn(scores, epsilon, iterations)


@torch.library.custom_op(f"{NAMESPACE}::scored_sinkhorn", mutates_args=())
def _op(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Return (scores, targets); the gradient reaches z and the centers from the first."""
    args = (z, centers, epsilon, iterations)
    with torch.autocast(z.device.type, enabled=False):
        candidates = {"triton": triton_unsupported_reason(z, centers), "reference": None}
        if not len(z) or choose("scored_sinkhorn", z.device, candidates) == "reference":
            return scored_sinkhorn_reference(*args)
        if requested() == "triton":
            return _fused(*args)
        kind = str(z.dtype).removeprefix("torch.")
        problem = f"scored_sinkhorn {kind} B{power_class(len(z))} K{len(centers)} D{z.shape[1]}"
        forms = {"fused": _fused, "apart": _apart}
        name, reason = autotune(problem, z.device, {name: partial(form, *args) for name, form in forms.items()})
        return forms[record(problem, z.device, name, reason)](*args)


@_op.register_fake
def _(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    scores = z.new_empty(len(z), len(centers), dtype=torch.float32)
    return scores, torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    z, centers = ctx.saved_tensors
    need_z, need_centers = ctx.needs_input_grad[:2]
    dz = (grad @ centers.to(grad.dtype)).to(z.dtype) if need_z else None
    dc = (grad.T @ z.to(grad.dtype)).to(centers.dtype) if need_centers else None
    return dz, dc, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _unsupported_tensors(z: Tensor, centers: Tensor) -> str | None:
    if z.dim() != 2 or z.shape[1] == 0 or z.dtype not in _DTYPES:
        return f"z must be [samples, width] in fp16, bf16 or fp32, got {list(z.shape)} in {z.dtype}"
    if centers.dim() != 2 or len(centers) == 0 or centers.shape[1] != z.shape[1]:
        return f"centers must be [centers, {z.shape[1]}] with at least one center, got {list(centers.shape)}"
    if centers.dtype != z.dtype or centers.device != z.device:
        return f"centers must be {z.dtype} on {z.device} as z is, got {centers.dtype} on {centers.device}"
    return None


def scored_sinkhorn(z: Tensor, centers: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Compute (scores, targets) [B, K] in fp32: z centers^T, with gradient, and `sinkhorn` of it, without.

    z: [B, D], centers: [K, D], of one dtype: fp16, bf16 or fp32; any strides; B may be 0. epsilon, iterations: as
    `sinkhorn`. Products are not rounded below fp32, with or without autocast. For a batch split over ranks take the
    product and `sinkhorn(all_reduce=...)`. Raises ValueError for arguments that do not fit.
    """
    if reason := _unsupported_tensors(z, centers) or unsupported_numbers(epsilon, iterations):
        raise ValueError(f"scored_sinkhorn: {reason}")
    if is_transformed("scored_sinkhorn", z, centers):
        return scored_sinkhorn_reference(z, centers, float(epsilon), iterations)
    return _op(z, centers, float(epsilon), iterations)
