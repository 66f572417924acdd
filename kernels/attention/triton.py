"""Triton form of `attention`: one kernel, with a body for the output, one for dq and one for dk and dv.

An image of n x n patches and a class token is one token over the edge of every tile: 257 = 4 * 64 + 1. So the first
T mod BLOCK tokens make a small block of their own (16, 32 or 64 rows, the only masked one), and the rest fill their
blocks exactly: 272 rows of work where 320 or 384 would be. The order of keys does not matter to attention.

Backward is two launches: dq by rows, which also leaves delta, then dk and dv by columns. P is made again in each;
nothing is added atomically, so a run repeats bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import INTERPRET, tl, triton

MAX_WIDTH = 128  # of a head
_LOG2_E = 1 / math.log(2)


@triton.jit
def _load(base, first, stride, limit, ROWS: tl.constexpr, SMALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
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
def _store(
    base, value, first, stride, limit, ROWS: tl.constexpr, SMALL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    t, c = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (c < D)[None, :]
    if SMALL:
        mask = mask & (t < limit)[:, None]
    tl.store(base + t.to(tl.int64)[:, None] * stride + c[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(left, right, acc, UPCAST_DOT: tl.constexpr):
    if UPCAST_DOT:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _scores(
    q, k, to_log2, limit, ROWS: tl.constexpr, KEYS: tl.constexpr, SMALL: tl.constexpr, UPCAST_DOT: tl.constexpr
):
    """Compute scale * q k^T in units of log 2; -inf at the keys beyond `limit` of a SMALL block."""
    s = _dot(q, k.T, tl.zeros((ROWS, KEYS), tl.float32), UPCAST_DOT) * to_log2
    if SMALL:
        s = tl.where((tl.arange(0, KEYS) < limit)[None, :], s, float("-inf"))
    return s


@triton.jit
def _attend(
    q,
    k,
    v,
    acc,
    peak,
    total,
    to_log2,
    limit,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SMALL: tl.constexpr,
    UPCAST_DOT: tl.constexpr,
):
    """Add one block of keys to the running output, its largest score and its sum."""
    s = _scores(q, k, to_log2, limit, ROWS, KEYS, SMALL, UPCAST_DOT)
    higher = tl.maximum(peak, tl.max(s, 1))
    p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(peak - higher)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], UPCAST_DOT)
    return acc, higher, total * shrink + tl.sum(p, 1)


@triton.jit
def _fwd_rows(
    q, k, v, out, lse, first, rest, T, stride_t, stride_o, to_log2,
    ROWS: tl.constexpr, SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    b_q = _load(q, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if BLOCK_S > 0:
        small_k = _load(k, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        small_v = _load(v, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        acc, peak, total = _attend(
            b_q, small_k, small_v, acc, peak, total, to_log2, rest, ROWS, BLOCK_S, True, UPCAST_DOT
        )
    for n in tl.range(rest, T, BLOCK_N):
        b_k = _load(k, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        b_v = _load(v, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        acc, peak, total = _attend(b_q, b_k, b_v, acc, peak, total, to_log2, rest, ROWS, BLOCK_N, False, UPCAST_DOT)
    _store(out, acc / total[:, None], first, stride_o, rest, ROWS, SMALL, D, BLOCK_D)
    t = first + tl.arange(0, ROWS)
    b_lse = (peak + tl.log2(total)) * 0.6931471805599453
    if SMALL:
        tl.store(lse + t, b_lse, mask=t < rest)
    else:
        tl.store(lse + t, b_lse)


@triton.jit
def _dq_rows(
    q, k, v, grad, out, lse, delta, dq, first, rest, T, stride_t, stride_o, scale, to_log2,
    ROWS: tl.constexpr, SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Compute dq of one block of rows, and store their delta."""
    b_q = _load(q, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    b_g = _load(grad, first, stride_o, rest, ROWS, SMALL, D, BLOCK_D)
    b_o = _load(out, first, stride_o, rest, ROWS, SMALL, D, BLOCK_D)
    t = first + tl.arange(0, ROWS)
    inside = t < (rest if SMALL else T)
    b_delta = tl.sum(b_o.to(tl.float32) * b_g.to(tl.float32), 1)
    tl.store(delta + t, b_delta, mask=inside)
    b_lse = tl.load(lse + t, mask=inside, other=0.0) * 1.4426950408889634
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if BLOCK_S > 0:
        small_k = _load(k, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        small_v = _load(v, 0, stride_t, rest, BLOCK_S, True, D, BLOCK_D)
        small_p = tl.exp2(_scores(b_q, small_k, to_log2, rest, ROWS, BLOCK_S, True, UPCAST_DOT) - b_lse[:, None])
        small_dp = _dot(b_g, small_v.T, tl.zeros((ROWS, BLOCK_S), tl.float32), UPCAST_DOT)
        acc = _dot((small_p * (small_dp - b_delta[:, None])).to(small_k.dtype), small_k, acc, UPCAST_DOT)
    for n in tl.range(rest, T, BLOCK_N):
        b_k = _load(k, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        b_v = _load(v, n, stride_t, rest, BLOCK_N, False, D, BLOCK_D)
        p = tl.exp2(_scores(b_q, b_k, to_log2, rest, ROWS, BLOCK_N, False, UPCAST_DOT) - b_lse[:, None])
        dp = _dot(b_g, b_v.T, tl.zeros((ROWS, BLOCK_N), tl.float32), UPCAST_DOT)
        acc = _dot((p * (dp - b_delta[:, None])).to(b_k.dtype), b_k, acc, UPCAST_DOT)
    _store(dq, acc * scale, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)


@triton.jit
def _dkv_step(
    q, grad, lse, delta, b_k, b_v, dk, dv, n, rest, T, stride_t, stride_o, to_log2,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, SMALL: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dk and dv of a block of keys; everything transposed."""
    b_q = _load(q, n, stride_t, rest, QUERIES, SMALL, D, BLOCK_D)
    b_g = _load(grad, n, stride_o, rest, QUERIES, SMALL, D, BLOCK_D)
    t = n + tl.arange(0, QUERIES)
    inside = t < (rest if SMALL else T)
    b_lse = tl.load(lse + t, mask=inside, other=0.0) * 1.4426950408889634
    b_delta = tl.load(delta + t, mask=inside, other=0.0)
    p = tl.exp2(_scores(b_k, b_q, to_log2, rest, ROWS, QUERIES, SMALL, UPCAST_DOT) - b_lse[None, :])
    dv = _dot(p.to(b_g.dtype), b_g, dv, UPCAST_DOT)
    dp = _dot(b_v, b_g.T, tl.zeros((ROWS, QUERIES), tl.float32), UPCAST_DOT)
    dk = _dot((p * (dp - b_delta[None, :])).to(b_q.dtype), b_q, dk, UPCAST_DOT)
    return dk, dv


@triton.jit
def _dkv_rows(
    q, k, v, grad, lse, delta, dk, dv, first, rest, T, stride_t, stride_o, scale, to_log2,
    ROWS: tl.constexpr, SMALL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST_DOT: tl.constexpr,
):  # fmt: skip
    b_k = _load(k, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    b_v = _load(v, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
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
    _store(dk, b_dk * scale, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)
    _store(dv, b_dv, first, stride_t, rest, ROWS, SMALL, D, BLOCK_D)


@triton.jit
def _attention_kernel(
    qkv, out, lse, grad, delta, dqkv,
    T, H, rest, scale, to_log2,
    PART: tl.constexpr,  # "forward", "dq" (and delta) or "dkv"
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
        if PART == "forward":
            _fwd_rows(q, k, v, out, lse, first, rest, T, stride_t, stride_o, to_log2,
                      BLOCK, False, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        elif PART == "dq":
            _dq_rows(q, k, v, grad, out, lse, delta, dq, first, rest, T, stride_t, stride_o, scale, to_log2,
                     BLOCK, False, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        else:
            _dkv_rows(q, k, v, grad, lse, delta, dk, dv, first, rest, T, stride_t, stride_o, scale, to_log2,
                      BLOCK, False, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
    elif BLOCK_S > 0:
        if PART == "forward":
            _fwd_rows(q, k, v, out, lse, 0, rest, T, stride_t, stride_o, to_log2,
                      BLOCK_S, True, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        elif PART == "dq":
            _dq_rows(q, k, v, grad, out, lse, delta, dq, 0, rest, T, stride_t, stride_o, scale, to_log2,
                     BLOCK_S, True, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip
        else:
            _dkv_rows(q, k, v, grad, lse, delta, dk, dv, 0, rest, T, stride_t, stride_o, scale, to_log2,
                      BLOCK_S, True, BLOCK_N, BLOCK_S, D, BLOCK_D, UPCAST_DOT)  # fmt: skip


def _launch(
    part: str, qkv: Tensor, out: Tensor, lse: Tensor, grad: Tensor, delta: Tensor, dqkv: Tensor, scale: float
) -> None:
    B, T, _, H, D = qkv.shape
    block_d = max(16, 1 << (D - 1).bit_length())
    kind = "_fp32" if qkv.element_size() == 4 else "_wide" if block_d > 64 else ""
    tiles = dict(tile(f"attention{kind}", qkv.device))
    rest = T % tiles["BLOCK"]
    small = max(16, 1 << (rest - 1).bit_length()) if rest else 0
    with torch.cuda.device_of(qkv):
        _attention_kernel[(triton.cdiv(T, tiles["BLOCK"]) * B * H,)](
            qkv, out, lse, grad, delta, dqkv,
            T, H, rest, scale, scale * _LOG2_E,
            PART=part, BLOCK_S=small, D=D, BLOCK_D=block_d, UPCAST_DOT=INTERPRET, **tiles, enable_fp_fusion=True,
        )  # fmt: skip


def forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a contiguous qkv [B, T, 3, H, d]."""
    out, lse = outputs(qkv)
    _launch("forward", qkv, out, lse, out, lse, qkv, scale)
    return out, lse


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Return dqkv [B, T, 3, H, d]; all arguments contiguous."""
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    for part in ("dq", "dkv"):
        _launch(part, qkv, out, lse, grad, delta, dqkv, scale)
    return dqkv


def outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty out [B, T, H, d] and lse [B, H, T]."""
    B, T, _, H, D = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=wide)
