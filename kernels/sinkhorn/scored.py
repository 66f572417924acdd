"""Scores of samples against centres and their Sinkhorn targets, in one launch where the product is small.

    scores = z c^T                              [B, K], fp32
    Q = sinkhorn(scores, epsilon, iterations)   [B, K], fp32, no gradient

B samples, K centres, D width. Backward: dz = G c, dc = G^T z for the gradient G of the scores.

Ways: `fused`: the first pass of Sinkhorn computes the scores a tile at a time, stores them once and has the columns'
parts from the tile; `apart`: the library's product, then `sinkhorn`. On a GPU the faster by measurement runs: the
product of a small problem is launch-bound, that of a large one belongs to the library.

The scores are stored because the loss and its backward read them. Made again in each pass instead they would cost
2 D flops a score and pass where reading one costs 4 bytes: at D = 128 the flops take longer on any GPU, in fp32.
Bytes moved by `fused`: z and c in (c once for every 16 or 64 rows, from L2), the scores out once and in `iterations`
times, Q out: one read of the scores and one launch fewer than `apart`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._autotune import autotune, power_class
from .._dispatch import NAMESPACE, choose, record, requested, triton_unsupported_reason
from .._tiles import tile
from .._triton import INTERPRET, tl, triton
from .kernels import scores_pass
from .op import argument_complaint, sinkhorn, sinkhorn_reference
from .triton import after_first_pass, by_turns, cut, launch, like_scores, room_for_rows, two_columns

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def scored_sinkhorn_reference(z: Tensor, centres: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """The specification, in fp32 or wider; the scores are differentiable by autograd. As `scored_sinkhorn`."""
    wide = torch.promote_types(z.dtype, torch.float32)
    scores = z.to(wide) @ centres.to(wide).T
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


def _fused(z: Tensor, centres: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    (B, D), K, tiles = z.shape, len(centres), tile("scored_sinkhorn", z.device)
    scores = z.new_empty(B, K, dtype=torch.float32)
    q, (peak, share) = like_scores(scores), two_columns(scores)
    # smaller blocks of rows while large ones would leave processors idle
    block_m = tiles["FEW_ROWS" if len(z) < tiles["MANY_ROWS"] else "BLOCK_M"]
    num_first = triton.cdiv(B, block_m)
    by = cut(scores, tiles=num_first * triton.cdiv(K, tiles["BLOCK_N"]), fewest_warps=4)
    part_peak = scores.new_empty(num_first, K)
    part_sum = scores.new_empty(max(num_first, by.num_parts), K)
    arrived = scores.new_zeros(1, dtype=torch.int32)
    # programs run in turn in the interpreter, where none may wait for the next
    one_launch = not INTERPRET
    with torch.cuda.device_of(z):
        _scored_kernel[(by.num_parts,)](
            z, centres, scores, q, part_peak, part_sum, room_for_rows(scores, by, peak), peak, share, arrived,
            math.log2(math.e) / epsilon, iterations, num_first, by.num_parts, B, K, D, *z.stride(), *centres.stride(),
            ONE_LAUNCH=one_launch, FITS=by.block_k >= K, UPCAST_DOT=INTERPRET,
            BLOCK_M=block_m, BLOCK_N=tiles["BLOCK_N"], BLOCK_D=tiles["BLOCK_D"],
            launch_cooperative_grid=one_launch, **by.options,
        )  # fmt: skip
    if not one_launch:
        launch(by_turns(iterations)[1:], scores, epsilon, peak, share, q=q, by=by, parts=(part_peak, part_sum))
    return scores, q


def _apart(z: Tensor, centres: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    scores = z.float() @ centres.float().T
    return scores, sinkhorn(scores, epsilon, iterations)


@torch.library.custom_op(f"{NAMESPACE}::scored_sinkhorn", mutates_args=())
def _op(z: Tensor, centres: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(scores, targets); the gradient reaches z and the centres from the first."""
    args = (z, centres, epsilon, iterations)
    with torch.autocast(z.device.type, enabled=False):
        candidates = {"triton": triton_unsupported_reason(z, centres), "reference": None}
        if not len(z) or choose("scored_sinkhorn", z.device, candidates) == "reference":
            return scored_sinkhorn_reference(*args)
        if requested() == "triton":
            return _fused(*args)
        kind = str(z.dtype).removeprefix("torch.")
        problem = f"scored_sinkhorn {kind} B{power_class(len(z))} K{len(centres)} D{z.shape[1]}"
        ways = {"fused": _fused, "apart": _apart}
        name, why = autotune(problem, z.device, {n: lambda way=way: way(*args) for n, way in ways.items()})
        return ways[record(problem, z.device, name, why)](*args)


@_op.register_fake
def _(z, centres, epsilon, iterations):
    scores = z.new_empty(len(z), len(centres), dtype=torch.float32)
    return scores, torch.empty_like(scores)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    z, centres = ctx.saved_tensors
    need_z, need_centres = ctx.needs_input_grad[:2]
    dz = (grad @ centres.to(grad.dtype)).to(z.dtype) if need_z else None
    dc = (grad.T @ z.to(grad.dtype)).to(centres.dtype) if need_centres else None
    return dz, dc, None, None


_op.register_autograd(_backward, setup_context=_keep)


def scored_sinkhorn(z: Tensor, centres: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(scores, targets) [B, K] in fp32: z centres^T, with gradient, and `sinkhorn` of it, without.

    z: [B, D], centres: [K, D], of one dtype: fp16, bf16 or fp32; any strides; B may be 0. epsilon, iterations: as
    `sinkhorn`. Products are not rounded below fp32, with or without autocast. For a batch split over ranks take the
    product and `sinkhorn(all_reduce=...)`. Raises ValueError for arguments that do not fit.
    """
    if message := _complaint(z, centres) or argument_complaint(epsilon, iterations):
        raise ValueError(f"scored_sinkhorn: {message}")
    return _op(z, centres, float(epsilon), iterations)


def _complaint(z: Tensor, centres: Tensor) -> str | None:
    if z.dim() != 2 or z.shape[1] == 0 or z.dtype not in _DTYPES:
        return f"z must be [samples, width] in fp16, bf16 or fp32, got {list(z.shape)} in {z.dtype}"
    if centres.dim() != 2 or len(centres) == 0 or centres.shape[1] != z.shape[1]:
        return f"centres must be [centres, {z.shape[1]}] with at least one centre, got {list(centres.shape)}"
    if centres.dtype != z.dtype or centres.device != z.device:
        return f"centres must be {z.dtype} on {z.device} as z is, got {centres.dtype} on {centres.device}"
    return None
