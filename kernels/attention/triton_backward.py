"""Kernel of attention's backward in two launches, for any number of tokens.

dq by rows, which also leaves delta, then dk and dv by columns. P is made again in each; nothing is added atomically,
so a run repeats bit for bit. The first T mod BLOCK tokens make a small block, as keys and as queries.
"""

from __future__ import annotations

from .._triton import dot, tl, triton
from .triton_kernels import load, scores, store


@triton.jit
def _dq_rows(
    q, k, v, grad, out, lse, delta, dq, first, rest, T, stride_t, stride_o, scale, to_log2,
    ROWS: tl.constexpr, SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute dq of one block of rows, and store their delta."""
    b_q = load(q, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    b_g = load(grad, first, stride_o, rest, ROWS, SMALL, D, BLOCK_D)
    b_o = load(out, first, stride_o, rest, ROWS, SMALL, D, BLOCK_D)
    t = first + tl.arange(0, ROWS)
    inside = t < (rest if SMALL else T)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(delta + t, b_delta, mask=inside)
    b_lse = tl.load(lse + t, mask=inside, other=0.0) * 1.4426950408889634
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if BLOCK_S > 0:
        small_k = load(k, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        small_v = load(v, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        small_p = tl.exp2(scores(b_q, small_k, to_log2, rest, ROWS, BLOCK_S, True, UPCAST_DOT) - b_lse[:, None])
        small_dp = dot(b_g, small_v.T, tl.zeros((ROWS, BLOCK_S), tl.float32), UPCAST_DOT)
        acc = dot((small_p * (small_dp - b_delta[:, None])).to(small_k.dtype), small_k, acc, UPCAST_DOT)
    for n in tl.range(rest, T, BLOCK_N):
        b_k = load(k, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        b_v = load(v, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        p = tl.exp2(scores(b_q, b_k, to_log2, rest, ROWS, BLOCK_N, False, UPCAST_DOT) - b_lse[:, None])
        dp = dot(b_g, b_v.T, tl.zeros((ROWS, BLOCK_N), tl.float32), UPCAST_DOT)
        acc = dot((p * (dp - b_delta[:, None])).to(b_k.dtype), b_k, acc, UPCAST_DOT)
    store(dq, acc * scale, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)


@triton.jit
def _dkv_step(
    q, grad, lse, delta, b_k, b_v, dk, dv, n, rest, T, stride_t, stride_o, to_log2,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, SMALL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dk and dv of a block of keys; everything transposed."""
    b_q = load(q, n, stride_t, rest, QUERIES, SMALL, D, BLOCK_D)
    b_g = load(grad, n, stride_o, rest, QUERIES, SMALL, D, BLOCK_D)
    t = n + tl.arange(0, QUERIES)
    inside = t < (rest if SMALL else T)
    b_lse = tl.load(lse + t, mask=inside, other=0.0) * 1.4426950408889634
    b_delta = tl.load(delta + t, mask=inside, other=0.0)
    p = tl.exp2(scores(b_k, b_q, to_log2, rest, ROWS, QUERIES, SMALL, UPCAST_DOT) - b_lse[None, :])
    dv = dot(p.to(b_g.dtype), b_g, dv, UPCAST_DOT)
    dp = dot(b_v, b_g.T, tl.zeros((ROWS, QUERIES), tl.float32), UPCAST_DOT)
    dk = dot((p * (dp - b_delta[None, :])).to(b_q.dtype), b_q, dk, UPCAST_DOT)
    return dk, dv


@triton.jit
def _dkv_rows(
    q, k, v, grad, lse, delta, dk, dv, first, rest, T, stride_t, stride_o, scale, to_log2,
    ROWS: tl.constexpr, SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    b_k = load(k, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    b_v = load(v, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    b_dk, b_dv = tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, BLOCK_D), tl.float32)
    if BLOCK_S > 0:
        b_dk, b_dv = _dkv_step(
            q, grad, lse, delta, b_k, b_v, b_dk, b_dv, 0, rest, T, stride_t, stride_o, to_log2,
            ROWS, BLOCK_S, True, D, BLOCK_D, UPCAST_DOT,
        )  # fmt: skip
    for n in tl.range(rest, T, BLOCK_N):
        b_dk, b_dv = _dkv_step(
            q, grad, lse, delta, b_k, b_v, b_dk, b_dv, n, rest, T, stride_t, stride_o, to_log2,
            ROWS, BLOCK_N, False, D, BLOCK_D, UPCAST_DOT,
        )  # fmt: skip
    store(dk, b_dk * scale, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    store(dv, b_dv, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)


@triton.jit
def backward_kernel(
    qkv, out, lse, grad, delta, dqkv,
    T, H, rest, scale, to_log2,
    PART: tl.constexpr,  # "dq" (and delta) or "dkv"
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute PART for one block of tokens of one head; the last program of a head has the small block."""
    # in one dimension: the others end at 65535, and a large batch has more heads
    blocks = tl.cdiv(T, BLOCK)
    i, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    stride_t, stride_o = 3 * H * D, H * D
    q = qkv + b * T * stride_t + h * D
    k, v = q + H * D, q + 2 * H * D
    dq = dqkv + b * T * stride_t + h * D
    dk, dv = dq + H * D, dq + 2 * H * D
    at_o, at_t = b * T * stride_o + h * D, head * T
    out, grad, lse, delta = out + at_o, grad + at_o, lse + at_t, delta + at_t
    first = rest + i * BLOCK
    if first < T:
        if PART == "dq":
            _dq_rows(q, k, v, grad, out, lse, delta, dq, first, rest, T, stride_t, stride_o, scale, to_log2,
                     BLOCK, False, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        else:
            _dkv_rows(q, k, v, grad, lse, delta, dk, dv, first, rest, T, stride_t, stride_o, scale, to_log2,
                      BLOCK, False, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
    elif BLOCK_S > 0:
        if PART == "dq":
            _dq_rows(q, k, v, grad, out, lse, delta, dq, 0, rest, T, stride_t, stride_o, scale, to_log2,
                     BLOCK_S, True, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        else:
            _dkv_rows(q, k, v, grad, lse, delta, dk, dv, 0, rest, T, stride_t, stride_o, scale, to_log2,
                      BLOCK_S, True, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
