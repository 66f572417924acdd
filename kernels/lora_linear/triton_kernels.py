"""The two kernels of the Triton form of `lora_linear`; triton.py launches them.

lora_linear_kernel    Y = X W^T + b + scale * S B^T     S made in the K loop, or given
lora_linear_sweep     P = scale * G B  and  Q = G^T S   one pass over G [M, N]
"""

from __future__ import annotations

from .._triton import dot, tl, triton


@triton.jit
def _load_tile(
    source, row, col, num_rows, num_cols, stride_row, stride_col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load the block at (row, col) of a matrix, zero outside it; `source` is a descriptor (TMA) or a pointer."""
    if TMA:
        block = source.load([row, col])
    else:
        i = row + tl.arange(0, BLOCK_ROWS)[:, None]
        j = col + tl.arange(0, BLOCK_COLS)[None, :]
        at = source + i.to(tl.int64) * stride_row + j.to(tl.int64) * stride_col
        block = tl.load(at, mask=(i < num_rows) & (j < num_cols), other=0.0)
    return block


@triton.jit
def _hash(h):
    # as in eager.py
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _is_kept(row, col, seed, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    i = (row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    j = (col + tl.arange(0, BLOCK_COLS)).to(tl.uint32)
    h = _hash(j[None, :] ^ _hash(i ^ tl.load(seed).to(tl.uint32))[:, None])
    return (h >> 1).to(tl.int32) >= threshold


@triton.jit
def lora_linear_kernel(
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
    """Compute Y [M, N] = X W^T, times the row scales of both (SCALED), + bias + the low-rank part (LORA)."""
    # lizard forgives: long, as one program holds the accumulators of both products in its registers
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
            acc = dot(b_x, b_w, acc, UPCAST_DOT)
            if LORA == "make":
                b_a = _load_tile(a, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False).T
                if DROPOUT:
                    b_x = tl.where(_is_kept(row, k, seed, drop_threshold, BLOCK_M, BLOCK_K), b_x, 0.0)
                acc_s = dot(b_x, b_a, acc_s, UPCAST_DOT)

        if SCALED:
            x_factor = tl.load(x_scale + m, mask=m_mask, other=0.0)
            acc *= x_factor[:, None] * tl.load(w_scale + n, mask=n_mask, other=0.0)[None, :]
        if LORA == "make":
            acc_s *= drop_scale
            # scaled before the one rounding, so that the product goes straight into the accumulator
            b_s = (scale * acc_s).to(y.dtype.element_ty)
            b_b = _load_tile(b, col, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).T
            acc = dot(b_s, b_b, acc, UPCAST_DOT)
            if STORE_S and col == 0:
                s_at = s + m.to(tl.int64)[:, None] * stride_sm + r[None, :] * stride_sr
                tl.store(s_at, acc_s.to(s.dtype.element_ty), mask=m_mask[:, None] & (r < R)[None, :])
        if LORA == "given":
            update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if DROPOUT else acc
            for r0 in tl.range(0, R, BLOCK_R):
                b_s = _load_tile(s, row, r0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
                b_b = _load_tile(b, col, r0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False).T
                update = dot(b_s, b_b, update, UPCAST_DOT)
            if DROPOUT:
                is_kept = _is_kept(row, col, seed, drop_threshold, BLOCK_M, BLOCK_N)
                acc += tl.where(is_kept, update * drop_scale, 0.0)
            else:
                acc = update
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        y_at = y + m.to(tl.int64)[:, None] * stride_ym + n[None, :]
        tl.store(y_at, acc.to(y.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def lora_linear_sweep(
    g, b, s, p, q, seed,
    scale, drop_threshold,
    M, N, R,
    stride_gm, stride_gn, stride_bn, stride_br, stride_sm, stride_sr, stride_pj, stride_pm, stride_pr,
    PROJECT: tl.constexpr, OUTER: tl.constexpr, DROPOUT: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute, of some columns of G, parts of P [M, R] = scale * G B (PROJECT) and of Q [N, R] = G^T S (OUTER).

    Program (i, j) takes the j-th columns and every i-th block of rows: a share of their rows of Q, summed in registers,
    and all that these columns add to P. The caller adds up the shares of Q over i and those of P over j.
    """
    i, col = tl.program_id(0), tl.program_id(1) * BLOCK_N
    n, r = col + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    if PROJECT:
        b_b = _load_tile(b, col, 0, N, R, stride_bn, stride_br, BLOCK_N, BLOCK_R, False)
    outer = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for block in tl.range(i, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M
        b_g = _load_tile(g, row, col, M, N, stride_gm, stride_gn, BLOCK_M, BLOCK_N, False)
        if DROPOUT:
            b_g = tl.where(_is_kept(row, col, seed, drop_threshold, BLOCK_M, BLOCK_N), b_g, 0.0)
        if OUTER:
            b_s = _load_tile(s, row, 0, M, R, stride_sm, stride_sr, BLOCK_M, BLOCK_R, False)
            outer = dot(b_g.T, b_s, outer, UPCAST_DOT)
        if PROJECT:
            part = scale * dot(b_g, b_b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), UPCAST_DOT)
            m = row + tl.arange(0, BLOCK_M)
            p_at = p + tl.program_id(1).to(tl.int64) * stride_pj + r[None, :] * stride_pr
            p_at += m.to(tl.int64)[:, None] * stride_pm
            tl.store(p_at, part.to(p.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])
    if OUTER:
        q_at = q + (i * N + n).to(tl.int64)[:, None] * R + r[None, :]
        tl.store(q_at, outer, mask=(n < N)[:, None] & (r < R)[None, :])
