"""The Triton form of `sinkhorn`: one resident grid runs all passes, or each pass is a launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._tiles import tile
from ._triton import INTERPRET, tl, triton

_LOWEST = tl.constexpr(-3.4e38)  # below any score, yet finite: -inf - -inf would be NaN


@triton.jit
def _load_scores(scores, row, k, B, K, stride_b, stride_k, BLOCK_B: tl.constexpr):
    """[BLOCK_B, BLOCK_K] in fp32, -inf outside the matrix."""
    b = row + tl.arange(0, BLOCK_B)
    at = scores + b.to(tl.int64)[:, None] * stride_b + k.to(tl.int64)[None, :] * stride_k
    return tl.load(at, mask=(b < B)[:, None] & (k < K)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def _exponent(x, peak, share, inverse):
    """t in powers of two."""
    return (x - peak[None, :]) * inverse + share[None, :]


@triton.jit
def _load_columns(peak, share, k, K):
    # .cg: another program of this launch may have written them, so not through this one's L1
    b_peak = tl.load(peak + k, mask=k < K, other=0.0, cache_modifier=".cg")
    return b_peak, tl.load(share + k, mask=k < K, other=0.0, cache_modifier=".cg") * 1.4426950408889634


@triton.jit
def _columns_pass(
    scores, part_peak, part_sum, inverse, B, K, stride_b, stride_k, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Of the rows of this program: every column's largest score and sum exp((score - it) / epsilon)."""
    step = tl.num_programs(0) * BLOCK_B
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        top = tl.full((BLOCK_K,), _LOWEST, tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
        for row in tl.range(tl.program_id(0) * BLOCK_B, B, step):
            x = _load_scores(scores, row, k, B, K, stride_b, stride_k, BLOCK_B)
            higher = tl.maximum(top, tl.max(x, 0))
            e = tl.exp2((x - higher[None, :]) * inverse)
            total = total * tl.exp2((top - higher) * inverse) + tl.sum(e, 0)
            top = higher
        at = tl.program_id(0).to(tl.int64) * K + k
        tl.store(part_peak + at, top, mask=k < K)
        tl.store(part_sum + at, total, mask=k < K)


@triton.jit
def _rows_pass(
    scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
    STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """softmax_k(t): stored as Q, or its column sums over the rows of this program."""
    start, step = tl.program_id(0) * BLOCK_B, tl.num_programs(0) * BLOCK_B
    out = part_sum + tl.program_id(0).to(tl.int64) * K
    if FITS:
        # a row at a time in registers; the next ones are on their way meanwhile
        k = tl.arange(0, BLOCK_K)
        b_peak, b_share = _load_columns(peak, share, k, K)
        total = tl.zeros((BLOCK_K,), tl.float32)
        x = _load_scores(scores, start, k, B, K, stride_b, stride_k, BLOCK_B)
        for row in tl.range(start, B, step):
            following = _load_scores(scores, row + step, k, B, K, stride_b, stride_k, BLOCK_B)
            t = _exponent(x, b_peak, b_share, inverse)
            e = tl.exp2(t - tl.maximum(tl.max(t, 1), _LOWEST)[:, None])
            b = row + tl.arange(0, BLOCK_B)
            b_q = e * (1.0 / tl.sum(e, 1))[:, None]
            if STORE:
                at = q + b.to(tl.int64)[:, None] * K + k[None, :]
                tl.store(at, b_q, mask=(b < B)[:, None] & (k < K)[None, :])
            else:
                total += tl.sum(tl.where((b < B)[:, None], b_q, 0.0), 0)
            x = following
        if not STORE:
            tl.store(out + k, total, mask=k < K)
    else:
        # rows [2, B]: the largest t of a row, and 1 / sum exp(t - it)
        for row in tl.range(start, B, step):
            b = row + tl.arange(0, BLOCK_B)
            top = tl.full((BLOCK_B,), _LOWEST, tl.float32)
            total = tl.zeros((BLOCK_B,), tl.float32)
            for first in tl.range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                b_peak, b_share = _load_columns(peak, share, k, K)
                x = _load_scores(scores, row, k, B, K, stride_b, stride_k, BLOCK_B)
                t = _exponent(x, b_peak, b_share, inverse)
                higher = tl.maximum(top, tl.max(t, 1))
                total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(t - higher[:, None]), 1)
                top = higher
            tl.store(rows + b, top, mask=b < B)
            tl.store(rows + B + b, 1.0 / total, mask=b < B)
        tl.debug_barrier()
        for first in tl.range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            b_peak, b_share = _load_columns(peak, share, k, K)
            total = tl.zeros((BLOCK_K,), tl.float32)
            for row in tl.range(start, B, step):
                b = row + tl.arange(0, BLOCK_B)
                x = _load_scores(scores, row, k, B, K, stride_b, stride_k, BLOCK_B)
                top = tl.load(rows + b, mask=b < B, other=0.0)
                b_q = tl.exp2(_exponent(x, b_peak, b_share, inverse) - top[:, None])
                b_q *= tl.load(rows + B + b, mask=b < B, other=0.0)[:, None]
                if STORE:
                    at = q + b.to(tl.int64)[:, None] * K + k[None, :]
                    tl.store(at, b_q, mask=(b < B)[:, None] & (k < K)[None, :])
                else:
                    total += tl.sum(b_q, 0)
            if not STORE:
                tl.store(out + k, total, mask=k < K)


@triton.jit
def _sum_pass(
    part_peak, part_sum, peak, share, total_out, inverse, num_parts, K,
    FIRST: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The programs' parts, in their order, to the sums of the columns; SPLIT: stored, else taken into `share`."""
    for first in tl.range(tl.program_id(0) * BLOCK_C, K, tl.num_programs(0) * BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        top = tl.full((BLOCK_C,), _LOWEST, tl.float32)
        if FIRST:
            for i in tl.range(0, num_parts, BLOCK_P):
                p = i + tl.arange(0, BLOCK_P)
                at = part_peak + p.to(tl.int64)[:, None] * K + k[None, :]
                mask = (p < num_parts)[:, None] & (k < K)[None, :]
                top = tl.maximum(top, tl.max(tl.load(at, mask, other=_LOWEST, cache_modifier=".cg"), 0))
            tl.store(peak + k, top, mask=k < K)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for i in tl.range(0, num_parts, BLOCK_P):
            p = i + tl.arange(0, BLOCK_P)
            at = p.to(tl.int64)[:, None] * K + k[None, :]
            mask = (p < num_parts)[:, None] & (k < K)[None, :]
            part = tl.load(part_sum + at, mask, other=0.0, cache_modifier=".cg")
            if FIRST:
                here = tl.load(part_peak + at, mask, other=_LOWEST, cache_modifier=".cg")
                part *= tl.exp2((here - top[None, :]) * inverse)
            total += tl.sum(part, 0)
        if SPLIT:
            tl.store(total_out + k, total, mask=k < K)
        else:
            before = 0.0 if FIRST else tl.load(share + k, mask=k < K, other=0.0, cache_modifier=".cg")
            tl.store(share + k, before - tl.log(total), mask=k < K)


@triton.jit
def _barrier(arrived, count):
    """Waits until all programs of the grid, which must be resident together, have come here `count` times."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < count * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _sinkhorn_kernel(
    scores, q, part_peak, part_sum, rows, peak, share, total, arrived,
    inverse,  # log2(e) / epsilon
    iterations, num_parts, B, K, stride_b, stride_k,
    PASS: tl.constexpr,  # "all" in one launch with barriers, or one of "columns", "rows", "sum", "assign"
    FIRST: tl.constexpr, SPLIT: tl.constexpr, FITS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if PASS == "all" or PASS == "columns":
        _columns_pass(scores, part_peak, part_sum, inverse, B, K, stride_b, stride_k, BLOCK_B, BLOCK_K)
    if PASS == "all":
        _barrier(arrived, 1)
        _sum_pass(
            part_peak, part_sum, peak, share, total, inverse, num_parts, K, True, SPLIT, BLOCK_P, BLOCK_C
        )  # fmt: skip
        _barrier(arrived, 2)
        for i in tl.range(1, iterations):
            _rows_pass(
                scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
                False, BLOCK_B, BLOCK_K, FITS,
            )  # fmt: skip
            _barrier(arrived, 2 * i + 1)
            _sum_pass(
                part_peak, part_sum, peak, share, total, inverse, num_parts, K, False, SPLIT, BLOCK_P, BLOCK_C
            )  # fmt: skip
            _barrier(arrived, 2 * i + 2)
    if PASS == "sum":
        _sum_pass(
            part_peak, part_sum, peak, share, total, inverse, num_parts, K, FIRST, SPLIT, BLOCK_P, BLOCK_C
        )  # fmt: skip
    if PASS == "all" or PASS == "rows" or PASS == "assign":
        _rows_pass(
            scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
            PASS != "rows", BLOCK_B, BLOCK_K, FITS,
        )  # fmt: skip


def _launch(
    passes: Sequence[str], scores: Tensor, epsilon: float, peak: Tensor, share: Tensor, *,
    iterations: int = 1, q: Tensor | None = None, total: Tensor | None = None,
) -> None:  # fmt: skip
    """Launches `passes` one after another. A "sum" ends the pass before it, in `total` if given, else in `share`."""
    B, K = scores.shape
    tiles = tile("sinkhorn", scores.device)
    block_k = min(triton.next_power_of_2(K), tiles["BLOCK"])
    resident = _resident_warps(scores.device)
    # a small problem is cut finer, so that more processors have a share of it; 16 scores a thread
    size = min(max(B * block_k // resident * 16, tiles["SMALL_BLOCK"]), tiles["BLOCK"])
    block_b = min(max(1, triton.next_power_of_2(size // block_k + 1) // 2), triton.next_power_of_2(B))
    num_warps = min(max(block_b * block_k // 512, 1), 16)
    num_parts = min(triton.cdiv(B, block_b), resident // num_warps)
    fits = block_k >= K
    part_peak, part_sum = (scores.new_empty(num_parts, K, dtype=torch.float32) for _ in range(2))
    rows = peak if fits else scores.new_empty(2, B, dtype=torch.float32)
    arrived = scores.new_zeros(1, dtype=torch.int32) if "all" in passes else peak
    with torch.cuda.device_of(scores):
        for i, name in enumerate(passes):
            grid = min(num_parts, triton.cdiv(K, 32)) if name == "sum" else num_parts
            _sinkhorn_kernel[(grid,)](
                scores, peak if q is None else q, part_peak, part_sum, rows, peak, share,
                peak if total is None else total, arrived,
                math.log2(math.e) / epsilon, iterations, num_parts, B, K, *scores.stride(),
                PASS=name, FIRST=passes[i - 1] == "columns", SPLIT=total is not None, FITS=fits,
                BLOCK_B=block_b, BLOCK_K=block_k, BLOCK_P=32, BLOCK_C=32,
                num_warps=num_warps, maxnreg=128, enable_fp_fusion=True, launch_cooperative_grid=name == "all",
            )  # fmt: skip


@functools.lru_cache
def _resident_warps(device: torch.device) -> int:
    """Warps of 128 registers a thread that the device holds at once; in the interpreter, those of three programs."""
    if device.type != "cuda":
        return 48
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def like_scores(scores: Tensor, *_: object) -> Tensor:
    """An empty [B, K] in fp32."""
    return scores.new_empty(scores.shape, dtype=torch.float32)


def two_columns(scores: Tensor, *_: object) -> tuple[Tensor, ...]:
    """Two empty [K] in fp32."""
    return tuple(scores.new_empty(scores.shape[1], dtype=torch.float32) for _ in range(2))


def assignments(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Q [B, K], in one launch."""
    peak, share = two_columns(scores)
    q = like_scores(scores)
    # programs run in turn in the interpreter, where none may wait for the next
    by_turns = ["columns", "sum", *["rows", "sum"] * (iterations - 1), "assign"]
    _launch(by_turns if INTERPRET else ["all"], scores, epsilon, peak, share, iterations=iterations, q=q)
    return q


def columns(scores: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(peak, sum) of every column, [K] each."""
    peak, total = two_columns(scores)
    _launch(["columns", "sum"], scores, epsilon, peak, peak, total=total)
    return peak, total


def rows(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    """The columns' sums [K] after the rows were brought to 1."""
    total = torch.empty_like(peak)
    _launch(["rows", "sum"], scores, epsilon, peak, share, total=total)
    return total


def assign(scores: Tensor, epsilon: float, peak: Tensor, share: Tensor) -> Tensor:
    """Q [B, K] from the columns' peaks and shares."""
    q = like_scores(scores)
    _launch(["assign"], scores, epsilon, peak, share, q=q)
    return q
