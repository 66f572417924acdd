"""Triton functions: the passes of `sinkhorn` over scores [B, K], and the product of `scored_sinkhorn`.

A pass is run by all programs of a grid. Between two of them stands a barrier, or the end of a launch.
"""

from __future__ import annotations

from .._triton import tl, triton

LOWEST = tl.constexpr(-3.4e38)  # below any score, yet finite: -inf - -inf would be NaN


@triton.jit
def _load_scores(scores, row, k, B, K, stride_b, stride_k, BLOCK_B: tl.constexpr):
    """Load [BLOCK_B, BLOCK_K] in fp32, -inf outside the matrix."""
    b = row + tl.arange(0, BLOCK_B)
    at = scores + b.to(tl.int64)[:, None] * stride_b + k.to(tl.int64)[None, :] * stride_k
    return tl.load(at, mask=(b < B)[:, None] & (k < K)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def _exponent(x, peak, share, inverse):
    """Compute t in powers of two."""
    return (x - peak[None, :]) * inverse + share[None, :]


@triton.jit
def _load_columns(peak, share, k, K):
    # .cg: another program of this launch may have written them, so not through this one's L1
    b_peak = tl.load(peak + k, mask=k < K, other=0.0, cache_modifier=".cg")
    return b_peak, tl.load(share + k, mask=k < K, other=0.0, cache_modifier=".cg") * 1.4426950408889634


@triton.jit
def columns_pass(
    scores, part_peak, part_sum, inverse, B, K, stride_b, stride_k, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Compute each column's largest score and sum exp((score - it) / epsilon) over the rows of this program."""
    step = tl.num_programs(0) * BLOCK_B
    for first in tl.range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        top = tl.full((BLOCK_K,), LOWEST, tl.float32)
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
def rows_pass(
    scores, q, part_sum, rows, peak, share, inverse, B, K, stride_b, stride_k,
    STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """Compute softmax_k(t) and store it as Q (STORE), or its column sums over the rows of this program."""
    start, step = tl.program_id(0) * BLOCK_B, tl.num_programs(0) * BLOCK_B
    out = part_sum + tl.program_id(0).to(tl.int64) * K
    if FITS:
        _whole_rows(
            scores, q, out, peak, share, inverse, B, K, stride_b, stride_k, start, step, STORE, BLOCK_B, BLOCK_K
        )
    else:
        _rows_by_blocks(
            scores, q, out, rows, peak, share, inverse, B, K, stride_b, stride_k, start, step, STORE, BLOCK_B, BLOCK_K
        )


@triton.jit
def _whole_rows(
    scores, q, out, peak, share, inverse, B, K, stride_b, stride_k, start, step,
    STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run `rows_pass` with BLOCK_B rows at a time in registers, while the next ones are loaded."""
    k = tl.arange(0, BLOCK_K)
    b_peak, b_share = _load_columns(peak, share, k, K)
    total = tl.zeros((BLOCK_K,), tl.float32)
    x = _load_scores(scores, start, k, B, K, stride_b, stride_k, BLOCK_B)
    for row in tl.range(start, B, step):
        following = _load_scores(scores, row + step, k, B, K, stride_b, stride_k, BLOCK_B)
        t = _exponent(x, b_peak, b_share, inverse)
        e = tl.exp2(t - tl.maximum(tl.max(t, 1), LOWEST)[:, None])
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


@triton.jit
def _rows_by_blocks(
    scores, q, out, rows, peak, share, inverse, B, K, stride_b, stride_k, start, step,
    STORE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run `rows_pass` in two sweeps; `rows` [2, B] holds the largest t of a row, and 1 / sum exp(t - it)."""
    for row in tl.range(start, B, step):
        b = row + tl.arange(0, BLOCK_B)
        top = tl.full((BLOCK_B,), LOWEST, tl.float32)
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
def sum_pass(
    part_peak, part_sum, peak, share, total_out, inverse, num_parts, K,
    FIRST: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the programs' parts, in their order, to the sums of the columns; SPLIT: stored, else put into `share`."""
    for first in tl.range(tl.program_id(0) * BLOCK_C, K, tl.num_programs(0) * BLOCK_C):
        k = first + tl.arange(0, BLOCK_C)
        top = tl.full((BLOCK_C,), LOWEST, tl.float32)
        if FIRST:
            for i in tl.range(0, num_parts, BLOCK_P):
                p = i + tl.arange(0, BLOCK_P)
                at = part_peak + p.to(tl.int64)[:, None] * K + k[None, :]
                mask = (p < num_parts)[:, None] & (k < K)[None, :]
                top = tl.maximum(top, tl.max(tl.load(at, mask, other=LOWEST, cache_modifier=".cg"), 0))
            tl.store(peak + k, top, mask=k < K)
        total = tl.zeros((BLOCK_C,), tl.float32)
        for i in tl.range(0, num_parts, BLOCK_P):
            p = i + tl.arange(0, BLOCK_P)
            at = p.to(tl.int64)[:, None] * K + k[None, :]
            mask = (p < num_parts)[:, None] & (k < K)[None, :]
            part = tl.load(part_sum + at, mask, other=0.0, cache_modifier=".cg")
            if FIRST:
                here = tl.load(part_peak + at, mask, other=LOWEST, cache_modifier=".cg")
                part *= tl.exp2((here - top[None, :]) * inverse)
            total += tl.sum(part, 0)
        if SPLIT:
            tl.store(total_out + k, total, mask=k < K)
        else:
            before = 0.0 if FIRST else tl.load(share + k, mask=k < K, other=0.0, cache_modifier=".cg")
            tl.store(share + k, before - tl.log(total), mask=k < K)


@triton.jit
def barrier(arrived, count):
    """Wait until all programs of the grid, which must be resident together, have come here `count` times."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < count * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _load_rows(
    matrix, row, column, num_rows, num_columns, stride_r, stride_c, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    i, j = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = matrix + i.to(tl.int64)[:, None] * stride_r + j.to(tl.int64)[None, :] * stride_c
    return tl.load(at, mask=(i < num_rows)[:, None] & (j < num_columns)[None, :], other=0.0)


@triton.jit
def scores_pass(
    z, c, scores, part_peak, part_sum, inverse, B, K, D, stride_zb, stride_zd, stride_ck, stride_cd,
    UPCAST_DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute scores [B, K] = z c^T by tiles, and of each BLOCK_M rows the parts that `columns_pass` gives."""
    num_n = tl.cdiv(K, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(B, BLOCK_M) * num_n, tl.num_programs(0)):
        part, first = tile // num_n, tile % num_n * BLOCK_N
        x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            b_z = _load_rows(z, part * BLOCK_M, d, B, D, stride_zb, stride_zd, BLOCK_M, BLOCK_D)
            b_c = _load_rows(c, first, d, K, D, stride_ck, stride_cd, BLOCK_N, BLOCK_D)
            if UPCAST_DOT:
                b_z, b_c = b_z.to(tl.float32), b_c.to(tl.float32)
            x = tl.dot(b_z, b_c.T, x, input_precision="ieee")
        b, k = part * BLOCK_M + tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
        tl.store(
            scores + b.to(tl.int64)[:, None] * K + k[None, :], x, mask=(b < B)[:, None] & (k < K)[None, :]
        )  # fmt: skip
        x = tl.where((b < B)[:, None], x, float("-inf"))
        top = tl.maximum(tl.max(x, 0), LOWEST)
        at = part.to(tl.int64) * K + k
        tl.store(part_peak + at, top, mask=k < K)
        tl.store(part_sum + at, tl.sum(tl.exp2((x - top[None, :]) * inverse), 0), mask=k < K)
