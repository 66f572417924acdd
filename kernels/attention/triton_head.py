"""Kernel of attention's backward in one launch: a program has a whole head.

It holds k and v of the first KEYS tokens in shared memory, and their gradients in registers, while it passes over the
queries. So dq of a block of queries is complete as soon as its dS is: 5 products where two launches need 7, dq is never
stored half done, and nothing is added between programs: a run repeats bit for bit.

All is transposed (keys are rows): S^T and dP^T then fill the widest tensor-core instruction however few queries a block
has, P^T and dS^T stay in registers for dv and dk, and only dS^T passes through shared memory, for dq.

Tokens beyond KEYS (a class token, registers: at most BLOCK_S) would need registers of their own in that loop. So a
first pass over the queries makes delta and everything that concerns those keys but their share of dq, of which it
leaves dS [T, BLOCK_S].
"""

from __future__ import annotations

from .._triton import dot, tl, triton
from .triton_kernels import load, store


@triton.jit
def _first_pass(
    q, k, v, grad, out, lse, delta, small, dk, dv, T, stride_t, stride_o, scale, to_log2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Store delta of all queries, and of the keys beyond KEYS dk, dv and dS."""
    if BLOCK_S > 0:
        b_k = load(k, KEYS, stride_t, T, BLOCK_S, True, D, BLOCK_D)
        b_v = load(v, KEYS, stride_t, T, BLOCK_S, True, D, BLOCK_D)
        dk_t, dv_t = tl.zeros((BLOCK_D, BLOCK_S), tl.float32), tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
        s = tl.arange(0, BLOCK_S)
    for n in tl.range(0, T, ROWS):
        t = n + tl.arange(0, ROWS)
        b_g = load(grad, n, stride_o, T, ROWS, True, D, BLOCK_D)
        b_o = load(out, n, stride_o, T, ROWS, True, D, BLOCK_D)
        b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
        tl.store(delta + t, b_delta, mask=t < T)
        if BLOCK_S > 0:
            b_q = load(q, n, stride_t, T, ROWS, True, D, BLOCK_D)
            b_lse = tl.load(lse + t, mask=t < T, other=float("inf")) * 1.4426950408889634
            zero = tl.zeros((ROWS, BLOCK_S), tl.float32)
            p = tl.exp2(dot(b_q, b_k.T, zero, UPCAST_DOT) * to_log2 - b_lse[:, None])
            p = tl.where((s < T - KEYS)[None, :], p, 0.0)
            ds = (p * (dot(b_g, b_v.T, zero, UPCAST_DOT) - b_delta[:, None])).to(b_q.dtype)
            tl.store(small + t[:, None] * BLOCK_S + s[None, :], ds, mask=(t < T)[:, None])
            dv_t = dot(b_g.T, p.to(b_g.dtype), dv_t, UPCAST_DOT)
            dk_t = dot(b_q.T, ds, dk_t, UPCAST_DOT)
    if BLOCK_S > 0:
        store(dk, dk_t.T * scale, KEYS, stride_t, T, BLOCK_S, True, D, BLOCK_D)
        store(dv, dv_t.T, KEYS, stride_t, T, BLOCK_S, True, D, BLOCK_D)


@triton.jit
def head_kernel(
    qkv, out, lse, grad, delta, small, dqkv,
    T, scale, to_log2,
    H: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    MASKED: tl.constexpr,  # fewer tokens than KEYS
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute dq, dk and dv of one head."""
    # lizard forgives: long, as the keys and the sums of their gradients stay in one program over all queries
    head = tl.program_id(0).to(tl.int64)
    b, h = head // H, head % H
    stride_t, stride_o = 3 * H * D, H * D
    q = qkv + b * T * stride_t + h * D
    k, v = q + H * D, q + 2 * H * D
    dq = dqkv + b * T * stride_t + h * D
    dk, dv = dq + H * D, dq + 2 * H * D
    at_o = b * T * stride_o + h * D
    out, grad = out + at_o, grad + at_o
    lse, delta, small = lse + head * T, delta + head * T, small + head * T * BLOCK_S
    _first_pass(q, k, v, grad, out, lse, delta, small, dk, dv, T, stride_t, stride_o, scale, to_log2,
                ROWS, KEYS, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
    tl.debug_barrier()  # other threads read what was stored
    b_k = load(k, 0, stride_t, T, KEYS, MASKED, D, BLOCK_D)
    b_v = load(v, 0, stride_t, T, KEYS, MASKED, D, BLOCK_D)
    if BLOCK_S > 0:
        k_s = load(k, KEYS, stride_t, T, BLOCK_S, True, D, BLOCK_D)
    b_dk, b_dv = tl.zeros((KEYS, BLOCK_D), tl.float32), tl.zeros((KEYS, BLOCK_D), tl.float32)
    for n in tl.range(0, T, BLOCK_N):
        b_q = load(q, n, stride_t, T, BLOCK_N, True, D, BLOCK_D)
        b_g = load(grad, n, stride_o, T, BLOCK_N, True, D, BLOCK_D)
        t = n + tl.arange(0, BLOCK_N)
        # a query that is not there has P = exp(S - inf) = 0
        b_lse = tl.load(lse + t, mask=t < T, other=float("inf")) * 1.4426950408889634
        b_delta = tl.load(delta + t, mask=t < T, other=0.0)
        zero = tl.zeros((KEYS, BLOCK_N), tl.float32)
        p = tl.exp2(dot(b_k, b_q.T, zero, UPCAST_DOT) * to_log2 - b_lse[None, :])
        if MASKED:
            p = tl.where((tl.arange(0, KEYS) < T)[:, None], p, 0.0)
        b_dv = dot(p.to(b_g.dtype), b_g, b_dv, UPCAST_DOT)
        ds = (p * (dot(b_v, b_g.T, zero, UPCAST_DOT) - b_delta[None, :])).to(b_q.dtype)
        b_dk = dot(ds, b_q, b_dk, UPCAST_DOT)
        dq_t = dot(b_k.T, ds, tl.zeros((BLOCK_D, BLOCK_N), tl.float32), UPCAST_DOT) * scale
        if BLOCK_S > 0:
            at = small + t[:, None] * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
            ds_s = tl.load(at, mask=(t < T)[:, None], other=0.0)
            # scaled apart: a sum of two products would be one product, whose tiles Triton lays out for the smaller
            dq_t += dot(k_s.T, ds_s.T, tl.zeros((BLOCK_D, BLOCK_N), tl.float32), UPCAST_DOT) * scale
        store(dq, dq_t.T, n, stride_t, T, BLOCK_N, True, D, BLOCK_D)
    store(dk, b_dk * scale, 0, stride_t, T, KEYS, MASKED, D, BLOCK_D)
    store(dv, b_dv, 0, stride_t, T, KEYS, MASKED, D, BLOCK_D)
