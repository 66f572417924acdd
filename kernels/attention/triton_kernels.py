"""Kernel of attention's forward, and what the kernels of its backward share.

An image of n x n patches and a class token is one token over the edge of every tile: 257 = 4 * 64 + 1. So the first
T mod BLOCK_N tokens make a small block of keys of their own (16, 32 or 64, the only masked one), and the others fill
their blocks exactly. The order of keys does not matter to attention. As queries, up to 16 such tokens ride with the
first full block of their head, by the same loads of k and v: at 257 tokens 6 % fewer instructions than as a program of
their own.
"""

from __future__ import annotations

from .._triton import dot, tl, triton


@triton.jit
def load(base, first, stride, limit, ROWS: tl.constexpr, SMALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows first .. first + ROWS of a matrix of D columns; in the SMALL block those from `limit` on are 0."""
    t, c = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    at = base + t.to(tl.int64)[:, None] * stride + c[None, :]
    if SMALL:
        return tl.load(at, mask=(t < limit)[:, None] & (c < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(at)
    else:
        return tl.load(at, mask=(c < D)[None, :], other=0.0)


@triton.jit
def store(
    base, value, first, stride, limit, ROWS: tl.constexpr, SMALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store rows first .. first + ROWS; of the SMALL block those before `limit`."""
    t, c = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (c < D)[None, :]
    if SMALL:
        mask = mask & (t < limit)[:, None]
    tl.store(base + t.to(tl.int64)[:, None] * stride + c[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def scores(q, k, to_log2, limit, ROWS: tl.constexpr, KEYS: tl.constexpr, SMALL: tl.constexpr, UPCAST_DOT: tl.constexpr):
    """Compute scale * q k^T in units of log 2; -inf at the keys beyond `limit` of a SMALL block."""
    s = dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32), UPCAST_DOT) * to_log2
    if SMALL:
        s = tl.where((tl.arange(0, KEYS) < limit)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attend(
    q, k, v, acc, peak, total, to_log2, limit,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SMALL: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running output, its largest score and its sum."""
    if SMALL:
        s = scores(q, k, to_log2, limit, ROWS, KEYS, True, UPCAST_DOT)
        higher = tl.maximum(peak, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
    else:
        # the scale is applied inside the exponent, where it costs nothing: one multiply-add
        s = dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32), UPCAST_DOT)
        higher = tl.maximum(peak, tl.max(s, 1) * to_log2)
        p = tl.exp2(s * to_log2 - higher[:, None])
    shrink = tl.exp2(peak - higher)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None], UPCAST_DOT)
    return acc, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def _finish(
    out, lse, acc, peak, total, first, end, stride_o,
    ROWS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store out and lse of one block of rows."""
    store(out, acc / total[:, None], first, stride_o, end, ROWS, MASKED, D, BLOCK_D)
    t = first + tl.arange(0, ROWS)
    b_lse = (peak + tl.log2(total)) * 0.6931471805599453
    if MASKED:
        tl.store(lse + t, b_lse, mask=t < end)
    else:
        tl.store(lse + t, b_lse)


@triton.jit
def _fwd_rows(
    q, k, v, out, lse, first, end, rest, T, stride_t, stride_o, to_log2,
    ROWS: tl.constexpr, MASKED: tl.constexpr, RIDE: tl.constexpr, NEGATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute rows first .. end of one block; with RIDE the small block of rows too, by the same loads of k and v."""
    b_q = load(q, first, stride_t, end, ROWS, MASKED, D, BLOCK_D)
    b_q = -b_q if NEGATIVE else b_q
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if RIDE:
        q_s = load(q, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        q_s = -q_s if NEGATIVE else q_s
        acc_s = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        peak_s, total_s = tl.full((BLOCK_S,), float("-inf"), tl.float32), tl.zeros((BLOCK_S,), tl.float32)
    if BLOCK_S > 0:
        k_s = load(k, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        v_s = load(v, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        acc, peak, total = _attend(b_q, k_s, v_s, acc, peak, total, to_log2, rest, ROWS, BLOCK_S, True, UPCAST_DOT)
        if RIDE:
            acc_s, peak_s, total_s = _attend(
                q_s, k_s, v_s, acc_s, peak_s, total_s, to_log2, rest, BLOCK_S, BLOCK_S, True, UPCAST_DOT
            )
    for n in tl.range(rest, T, BLOCK_N):
        b_k = load(k, n, stride_t, T, BLOCK_N, False, D, BLOCK_D)
        b_v = load(v, n, stride_t, T, BLOCK_N, False, D, BLOCK_D)
        acc, peak, total = _attend(b_q, b_k, b_v, acc, peak, total, to_log2, rest, ROWS, BLOCK_N, False, UPCAST_DOT)
        if RIDE:
            acc_s, peak_s, total_s = _attend(
                q_s, b_k, b_v, acc_s, peak_s, total_s, to_log2, rest, BLOCK_S, BLOCK_N, False, UPCAST_DOT
            )
    _finish(out, lse, acc, peak, total, first, end, stride_o, ROWS, MASKED, D, BLOCK_D)
    if RIDE:
        _finish(out, lse, acc_s, peak_s, total_s, 0, rest, stride_o, BLOCK_S, True, D, BLOCK_D)


@triton.jit
def forward_kernel(
    qkv, out, lse,
    T, H, rest, blocks, to_log2,
    NEGATIVE: tl.constexpr,  # the scale is: to_log2 is its size, and q changes sign
    RIDES: tl.constexpr, MASKED: tl.constexpr,  # the small block rides; the last full block is not full
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute out and lse for one of the `blocks` blocks of queries of one head."""
    # in one dimension: the others end at 65535, and a large batch has more heads
    i, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    stride_t, stride_o = 3 * H * D, H * D
    q = qkv + b * T * stride_t + h * D
    k, v = q + H * D, q + 2 * H * D
    out, lse = out + b * T * stride_o + h * D, lse + head * T
    first = rest + i * BLOCK
    if RIDES and i == 0:
        _fwd_rows(q, k, v, out, lse, first, T, rest, T, stride_t, stride_o, to_log2,
                  BLOCK, MASKED, True, NEGATIVE, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
    elif first < T:
        _fwd_rows(q, k, v, out, lse, first, T, rest, T, stride_t, stride_o, to_log2,
                  BLOCK, MASKED, False, NEGATIVE, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
    elif BLOCK_S > 0 and not RIDES:
        _fwd_rows(q, k, v, out, lse, 0, rest, rest, T, stride_t, stride_o, to_log2,
                  BLOCK_S, True, False, NEGATIVE, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
