"""The Triton form of `lora_linear`: two kernels serve forward and backward.

    _lora_linear_kernel    Y = X W^T + b + scale * S B^T     S made in the K loop, or given
    _lora_linear_sweep     P = scale * G B  and  Q = G^T S   one pass over G [M, N]

Forward: one launch for each run of rows (adapted, or the gap between), S made in the K loop by a small dot.
Backward: a sweep of dY gives dS and dB, a sweep of x gives dA; dX = dY W + dS A is the first kernel, S given.
Ranks are padded to BLOCK_R; wide ones go in slices, and then S is made by a sweep of its own.
Deterministic: Q is summed from one partial per program, in their order; no atomics.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._tiles import tile
from ._triton import INTERPRET, tl, triton
from .lora_linear_plain import drop_threshold

MAX_RANK = 32  # of one slice: at 64 the registers spill beside the accumulators (sm_80)


@triton.jit
def _load_tile(
    source, row, col, num_rows, num_cols, stride_row, stride_col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The block at (row, col) of a matrix, zero outside it; `source` is a descriptor (TMA) or a pointer."""
    if TMA:
        block = source.load([row, col])
    else:
        i = row + tl.arange(0, BLOCK_ROWS)[:, None]
        j = col + tl.arange(0, BLOCK_COLS)[None, :]
        at = source + i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_col
        block = tl.load(at, mask=(i < num_rows) & (j < num_cols), other=0.0)
    return block


@triton.jit
def _dot(left, right, acc, UPCAST_DOT: tl.constexpr):
    if UPCAST_DOT:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _hash(h):
    # as in lora_linear_plain.py
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _kept(row, col, seed, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    i = (row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    j = (col + tl.arange(0, BLOCK_COLS)).to(tl.uint32)
    h = _hash(j[None, :] ^ _hash(i ^ tl.load(seed).to(tl.uint32))[:, None])
    return (h >> 1).to(tl.int32) >= threshold


@triton.jit
def _lora_linear_kernel(
    x, w, bias, a, b, s, y, seed, x_scale, w_scale,
    scale, drop_threshold, drop_scale,
    M, N, K, R,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br,
    stride_sm, stride_sr, stride_ym,
    LORA: tl.constexpr,  # "none", "make" (S from x, stored) or "given"
    STORE_S: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr,
    TMA: tl.constexpr, W_TRANSPOSED: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    for index in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        # grouped order: GROUP_M rows of blocks share their columns of W in L2
        group = index // (GROUP_M * num_n)
        first = group * GROUP_M
        height = min(num_m - first, GROUP_M)
        row = (first + index % (GROUP_M * num_n) % height) * BLOCK_M
        col = (index % (GROUP_M * num_n) // height) * BLOCK_N
        m, n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        m_mask, n_mask = m < M, n < N

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in tl.range(0, K, BLOCK_K):
            b_x = _load_tile(x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, TMA)
            if W_TRANSPOSED:
                b_w = _load_tile(w, k, col, K, N, stride_wk, stride_wn, BLOCK_K, BLOCK_N, TMA)
            else:
                b_w = _load_tile(w, col, k, N, K, stride_wn, stride_wk, BLOCK_N, BLOCK_K, TMA).T
            acc = _dot(b_x, b_w, acc, UPCAST_DOT)
            if LORA == "make":
                b_a = _load_tile(a, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False).T
                if DROPOUT:
                    b_x = tl.where(_kept(row, k, seed, drop_threshold, BLOCK_M, BLOCK_K), b_x, 0.0)
                acc_s = _dot(b_x, b_a, acc_s, UPCAST_DOT)

        if SCALED:
            x_factor = tl.load(x_scale + m, mask=m_mask, other=0.0)
            acc *= x_factor[:, None] * tl.load(w_scale + n, mask=n_mask, other=0.0)[None, :]
        if LORA == "make":
            acc_s *= drop_scale
            # scaled before the one rounding, so that the product goes straight into the accumulator
            b_s = (scale * acc_s).to(y.dtype.element_ty)
            b_b = _load_tile(b, col, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).T
            acc = _dot(b_s, b_b, acc, UPCAST_DOT)
            if STORE_S and col == 0:
                s_at = s + m.to(tl.int64)[:, None] * stride_sm + r[None, :] * stride_sr
                tl.store(s_at, acc_s.to(s.dtype.element_ty), mask=m_mask[:, None] & (r < R)[None, :])
        if LORA == "given":
            update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if DROPOUT else acc
            for r0 in tl.range(0, R, BLOCK_R):
                b_s = _load_tile(s, row, r0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
                b_b = _load_tile(b, col, r0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).T
                update = _dot(b_s, b_b, update, UPCAST_DOT)
            if DROPOUT:
                kept = _kept(row, col, seed, drop_threshold, BLOCK_M, BLOCK_N)
                acc += tl.where(kept, update * drop_scale, 0.0)
            else:
                acc = update
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        y_at = y + m.to(tl.int64)[:, None] * stride_ym + n[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _lora_linear_sweep(
    g, b, s, p, q, seed,
    scale, drop_threshold,
    M, N, R,
    stride_gm, stride_gn, stride_bn, stride_br, stride_sm, stride_sr, stride_pm, stride_pr,
    PROJECT: tl.constexpr, OUTER: tl.constexpr, DROPOUT: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """P [M, R] = scale * G B (PROJECT) and the programs' shares of Q [programs, N, R] = G^T S (OUTER)."""
    first = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    for block in tl.range(first, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M
        m = row + tl.arange(0, BLOCK_M)
        if OUTER:
            b_s = _load_tile(s, row, 0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for col in tl.range(0, N, BLOCK_N):
            b_g = _load_tile(g, row, col, M, N, stride_gm, stride_gn, BLOCK_M, BLOCK_N, False)
            if DROPOUT:
                b_g = tl.where(_kept(row, col, seed, drop_threshold, BLOCK_M, BLOCK_N), b_g, 0.0)
            if PROJECT:
                b_b = _load_tile(b, col, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False)
                acc = _dot(b_g, b_b, acc, UPCAST_DOT)
            if OUTER:
                share = _dot(b_g.T, b_s, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), UPCAST_DOT)
                n = col + tl.arange(0, BLOCK_N)
                q_at = q + (first * N + n).to(tl.int64)[:, None] * R + r[None, :]
                q_mask = (n < N)[:, None] & (r < R)[None, :]
                if block != first:
                    # the share of the block before, written by this program
                    tl.debug_barrier()
                    share += tl.load(q_at, mask=q_mask, other=0.0)
                tl.store(q_at, share, mask=q_mask)
        if PROJECT:
            p_at = p + m.to(tl.int64)[:, None] * stride_pm + r[None, :] * stride_pr
            tl.store(p_at, (scale * acc).to(p.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


def forward(x, weight, bias, a, b, scale, dropout, seed, rows, keep):
    """(y, S or an empty tensor), as the strategies of lora_linear.py."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    if b.shape[1] <= MAX_RANK:
        s = x.new_empty(x.shape[0] if keep else 0, a.shape[0])
        _launch_runs(x, weight, y, bias, b, s, rows, a=a, scale=scale, dropout=dropout, seed=seed)
    else:
        s = project(x, a, dropout, seed)
        _launch_runs(x, weight, y, bias, scale * b, s, rows)
    return y, s if keep else x.new_empty(0, a.shape[0])


def forward_scaled(x, weight, scales, bias, b, s, dtype, rows):
    """y = (x weight^T) times the row scales of both + bias + S b^T, in dtype; x and weight in fp8."""
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    _launch_runs(x, weight, y, bias, b, s, rows, scales=scales)
    return y


def project(x, a, dropout, seed):
    """S = drop(x) a^T."""
    s = x.new_empty(x.shape[0], a.shape[0])
    for r in range(0, a.shape[0], MAX_RANK):
        here = slice(r, min(r + MAX_RANK, a.shape[0]))
        _sweep(x, a[here].T, None, s[:, here], 1 / (1 - dropout), dropout, seed)
    return s


def adapter(grad, x, a, b, s, scale, dropout, seed, rows, needs):
    """(dS, dA, dB), None where `needs` (x, a, b) has no use for it."""
    need_x, need_a, need_b = needs
    rank = b.shape[1]
    ds = grad.new_empty(grad.shape[0], a.shape[0]) if need_x or need_a else None
    db = b.new_empty(b.shape, dtype=torch.float32) if need_b else None
    taken = 0
    for t, (start, stop) in enumerate(_spans(rows) or [(0, grad.shape[1])]):
        block = slice(taken, taken + stop - start)
        for r in range(0, rank, MAX_RANK):
            here = slice(r, min(r + MAX_RANK, rank))
            ranks = slice(t * rank + here.start, t * rank + here.stop)
            share = _sweep(
                grad[:, start:stop],
                b[block, here] if ds is not None else None, s[:, ranks] if need_b else None,
                ds[:, ranks] if ds is not None else None, scale,
            )  # fmt: skip
            if db is not None:
                db[block, here] = share * scale
        taken = block.stop
    if not need_a:
        return ds, None, db
    da = a.new_empty(a.shape, dtype=torch.float32)
    for r in range(0, a.shape[0], MAX_RANK):
        here = slice(r, min(r + MAX_RANK, a.shape[0]))
        share = _sweep(x, None, ds[:, here], None, 1.0, dropout, seed)
        da[here] = share.T * (1 / (1 - dropout))
    return ds, da, db


def input_gradient(grad, weight, ds, a, b, scale, dropout, seed, rows):
    """dX = dY W + drop'(dS A)."""
    dx = grad.new_empty(grad.shape[0], weight.shape[1])
    _launch(grad, weight.T, dx, b=a.T, s=ds, dropout=dropout, seed=seed)
    return dx


def _launch_runs(x, weight, y, bias, b, s, rows, a=None, scales=None, **options):
    """One launch for each adapted run of rows of weight and each gap between them."""
    N, rank = weight.shape[0], b.shape[1]

    def launch(start: int, stop: int, **lora: Any) -> None:
        if start < stop:
            x_scale, w_scale = scales or (None, None)
            _launch(
                x, weight[start:stop], y[:, start:stop],
                bias=None if bias is None else bias[start:stop],
                scales=None if scales is None else (x_scale, w_scale[start:stop]),
                **lora,
            )  # fmt: skip

    taken, done = 0, 0
    for t, (start, stop) in enumerate(_spans(rows) or [(0, N)]):
        ranks, block = slice(t * rank, t * rank + rank), b[taken : taken + stop - start]
        launch(done, start)
        launch(start, stop, a=None if a is None else a[ranks], b=block, s=s[:, ranks], **options)
        taken, done = taken + stop - start, stop
    launch(done, N)


def _launch(x, w, y, *, bias=None, a=None, b=None, s=None, scale=1.0, dropout=0.0, seed=None, scales=None, tma=None):
    """y [M, N] <- x w^T + bias + the low-rank part; x: [M, K], w: [N, K].

    With `a` that part is scale * drop(x) a^T b^T, and s, if it has rows, receives drop(x) a^T.
    Without, it is drop'(s b^T). scales: of the rows of x and of w, by which their product is multiplied.
    """
    (M, K), N = x.shape, w.shape[0]
    R = 1 if b is None else b.shape[1]
    kind = {1: "_fp8", 4: "_fp32"}.get(x.element_size(), "_masked" if dropout and a is None else "")
    tiles = dict(tile(f"lora_linear{kind}", x.device))
    lora = "none" if b is None else "make" if a is not None else "given"
    transposed = w.stride(1) != 1 and w.stride(0) == 1
    stored_w = w.T if transposed else w
    x_block = [tiles["BLOCK_M"], tiles["BLOCK_K"]]
    w_block = [tiles["BLOCK_K"], tiles["BLOCK_N"]] if transposed else [tiles["BLOCK_N"], tiles["BLOCK_K"]]
    if tma is None:
        tma = _has_tma(x.device) and _fits_tma(x) and _fits_tma(stored_w)
    blocks = triton.cdiv(M, tiles["BLOCK_M"]) * triton.cdiv(N, tiles["BLOCK_N"])
    a_, b_, s_ = (x if t is None else t for t in (a, b, s))
    x_scale, w_scale = scales or (x, x)
    with torch.cuda.device_of(x):
        _lora_linear_kernel[(min(blocks, _num_programs(x.device)),)](
            _descriptor(x, x_block) if tma else x,
            _descriptor(stored_w, w_block) if tma else w,
            x if bias is None else bias, a_, b_, s_, y, x if seed is None else seed, x_scale, w_scale,
            scale, *_drop_numbers(dropout),
            M, N, K, R,
            *x.stride(), *w.stride(), *a_.stride(), *b_.stride(), *s_.stride(), y.stride(0),
            LORA=lora, STORE_S=s is not None and s.shape[0] > 0, HAS_BIAS=bias is not None,
            DROPOUT=dropout > 0, SCALED=scales is not None, TMA=tma, W_TRANSPOSED=transposed, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles,
        )  # fmt: skip


def _sweep(g, b, s, p, scale, dropout=0.0, seed=None):
    """Fills p = scale * g b if b is given; returns g^T s [N, R] in fp32 if s is given."""
    M, N = g.shape
    R = (b if b is not None else s).shape[1]
    tiles = dict(tile("lora_linear_sweep" if g.element_size() == 2 else "lora_linear_sweep_fp32", g.device))
    programs = min(triton.cdiv(M, tiles["BLOCK_M"]), _num_programs(g.device))
    q = g.new_empty(programs if s is not None else 0, N, R, dtype=torch.float32)
    b_, s_, p_ = (g if t is None else t for t in (b, s, p))
    threshold, _ = _drop_numbers(dropout)
    with torch.cuda.device_of(g):
        _lora_linear_sweep[(programs,)](
            g, b_, s_, p_, q, g if seed is None else seed,
            scale, threshold,
            M, N, R,
            *g.stride(), *b_.stride(), *s_.stride(), *p_.stride(),
            PROJECT=b is not None, OUTER=s is not None, DROPOUT=dropout > 0, UPCAST_DOT=INTERPRET,
            BLOCK_R=_block_r(R), **tiles,
        )  # fmt: skip
    return q.sum(0) if s is not None else None


def _spans(rows: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(rows[::2], rows[1::2], strict=True))


def _block_r(R: int) -> int:
    # tl.dot wants at least 16
    return min(max(16, 1 << (R - 1).bit_length()), MAX_RANK)


def _drop_numbers(dropout: float) -> tuple[int, float]:
    return drop_threshold(dropout), 1 / (1 - dropout)


@functools.lru_cache
def _num_programs(device: torch.device) -> int:
    # in the interpreter: few, so that a program meets more than one block
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.lru_cache
def _has_tma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _fits_tma(matrix: Tensor) -> bool:
    size = matrix.element_size()
    return matrix.stride(1) == 1 and matrix.stride(0) * size % 16 == 0 and matrix.data_ptr() % 16 == 0


def _descriptor(matrix: Tensor, block: list[int]):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)
