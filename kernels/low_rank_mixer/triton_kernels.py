"""Triton kernels of `low_rank_mixer`, forward: channels first, then tokens or nothing. op.py has the formulas.

    rows      u = b + a;  low = W1 norm(u) + c1 of the channels;  the statistics of x = u + h, or without tokens out
    columns   low = W1 norm(x) + c1 of the tokens;  out

A change is a product of two thin matrices, so a tile of it is made where it is used and never stored:

    h [n, d] = gelu(low) [n, r] W2^T [r, d] + c2 [d]      of the channels (c_ in the kernels), rank R
    t [n, d] = W2 [n, s] gelu(low) [s, d] + c2 [n]        of the tokens (t_), rank S

A rows kernel owns some tokens n with all D channels (norms, sums over channels), a columns kernel some channels d with
all N tokens. p: image. Ranks are padded to 16 at least.
"""

from __future__ import annotations

from .._triton import dot, tl, triton

MAX_RANK = 32  # beyond it the backward kernels spill registers


@triton.jit
def normal_share(x):
    """Compute P(X < x) of a standard normal X."""
    return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)


@triton.jit
def product(left, right, UPCAST_DOT: tl.constexpr):
    """Compute left right in fp32."""
    return dot(left, right, tl.zeros((left.shape[0], right.shape[1]), tl.float32), UPCAST_DOT)


@triton.jit
def thin(like, source, i, j, rows, columns, stride_i, stride_j, GELU: tl.constexpr = False):
    """Load source[i, j] in the type of `like`, 0 outside [rows, columns]; GELU: its GELU."""
    at = source + i[:, None] * stride_i + j[None, :] * stride_j
    value = tl.load(at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)
    if GELU:
        value = value.to(tl.float32)
        value *= normal_share(value)
    return value.to(like.dtype.element_ty)


@triton.jit
def vector(source, i, size):
    """Load source[i] in fp32, 0 outside."""
    return tl.load(source + i, mask=i < size, other=0.0).to(tl.float32)


@triton.jit
def merged_moments(mean, square, x, mask, seen, D):
    """Merge mean and sum of squares about it of `seen` columns with those of x (Chan, Golub, LeVeque 1983)."""
    count = tl.minimum(D - seen, x.shape[1]).to(tl.float32)
    here = tl.sum(tl.where(mask, x, 0.0), 1) / count
    off = tl.where(mask, x - here[:, None], 0.0)
    gap, share = here - mean, count / (seen + count)
    return mean + gap * share, square + tl.sum(off * off, 1) + gap * gap * (seen * share)


@triton.jit
def rstd_of(square, D, eps):
    """Compute 1 / sqrt(variance + eps) from the sum of squares about the mean."""
    return tl.div_rn(1.0, tl.sqrt_rn(square / D + eps))


@triton.jit
def _tile_of_u(b, a, like, at, mask, share, GATED: tl.constexpr):
    """Compute u, rounded as it is saved, and b - a."""
    b_b = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
    b_a = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
    difference = b_b - b_a
    if GATED:
        b_u = b_a + share * difference
    else:
        b_u = b_a + b_b
    return b_u.to(like.dtype.element_ty), difference


@triton.jit
def rows_fwd_kernel(
    b, a, u, difference, out, base, stats, gate, scale, c_low, c_down, c_down_bias, c_up, c_bias,
    N, D, R, cells, eps,
    GATED: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute u, the channels' low and the statistics of x for some tokens; without TOKENS out instead."""
    # lizard forgives: long, as one program makes three passes over its rows with statistics in its registers
    tiles = tl.cdiv(N, BLOCK_N)
    p = (tl.program_id(0) // tiles).to(tl.int64)
    n, r = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    row, image = p * N, p * N * D
    share = 1.0
    if GATED:
        share = 1.0 / (1.0 + tl.exp(-tl.load(gate).to(tl.float32)))
    mean, square = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        b_u, b_difference = _tile_of_u(b + image, a + image, u, at, mask, share, GATED)
        tl.store(u + image + at, b_u, mask=mask)
        if GATED:
            tl.store(difference + image + at, b_difference.to(u.dtype.element_ty), mask=mask)
        mean, square = merged_moments(mean, square, b_u.to(tl.float32), mask, d0, D)
    rstd = rstd_of(square, D, eps)

    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        x, _ = _tile_of_u(b + image, a + image, u, at, mask, share, GATED)
        x_hat = tl.where(mask, (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0).to(u.dtype.element_ty)
        acc = dot(x_hat, thin(u, c_down, d, r, D, R, 1, D), acc, UPCAST_DOT)
    b_low = (acc + vector(c_down_bias, r, R)[None, :]).to(u.dtype.element_ty)
    ranks = (n < N)[:, None] & (r < R)[None, :]
    tl.store(c_low + row * R + n[:, None] * R + r[None, :], b_low, mask=ranks)
    b_g = b_low.to(tl.float32)
    b_g = (b_g * normal_share(b_g)).to(u.dtype.element_ty)

    mean, square = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        h = product(b_g, thin(u, c_up, r, d, R, D, 1, R), UPCAST_DOT) + vector(c_bias, d, D)[None, :]
        if TOKENS:
            x, _ = _tile_of_u(b + image, a + image, u, at, mask, share, GATED)
            mean, square = merged_moments(mean, square, x.to(tl.float32) + h, mask, d0, D)
        else:
            if SCALED:
                h *= tl.load(scale).to(tl.float32)
            h += tl.load(base + image + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + image + at, h.to(out.dtype.element_ty), mask=mask)
    if TOKENS:
        tl.store(stats + row + n, mean, mask=n < N)
        tl.store(stats + cells + row + n, rstd_of(square, D, eps), mask=n < N)


@triton.jit
def columns_fwd_kernel(
    u, out, base, stats, scale, c_low, c_up, c_bias, t_low, t_down, t_down_bias, t_up, t_bias,
    N, D, R, S, cells,
    SCALED: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute the tokens' low and out for some channels."""
    tiles = tl.cdiv(D, BLOCK_D)
    p = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    r, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    row, image = p * N, p * N * D
    b_up, b_bias = thin(u, c_up, r, d, R, D, 1, R), vector(c_bias, d, D)[None, :]
    acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        h = product(thin(u, c_low + row * R, n, r, N, R, R, 1, True), b_up, UPCAST_DOT) + b_bias
        x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32) + h
        mean, rstd = vector(stats + row, n, N)[:, None], vector(stats + cells + row, n, N)[:, None]
        x_hat = tl.where(mask, (x - mean) * rstd, 0.0).to(u.dtype.element_ty)
        acc = dot(thin(u, t_down, s, n, S, N, N, 1), x_hat, acc, UPCAST_DOT)
    b_low = (acc + vector(t_down_bias, s, S)[:, None]).to(u.dtype.element_ty)
    ranks = (s < S)[:, None] & (d < D)[None, :]
    tl.store(t_low + p * S * D + s[:, None] * D + d[None, :], b_low, mask=ranks)
    b_g = b_low.to(tl.float32)
    b_g = (b_g * normal_share(b_g)).to(u.dtype.element_ty)
    for n0 in tl.range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        change = product(thin(u, c_low + row * R, n, r, N, R, R, 1, True), b_up, UPCAST_DOT) + b_bias
        change += product(thin(u, t_up, n, s, N, S, S, 1), b_g, UPCAST_DOT) + vector(t_bias, n, N)[:, None]
        if SCALED:
            change *= tl.load(scale).to(tl.float32)
        change += tl.load(base + image + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + image + at, change.to(out.dtype.element_ty), mask=mask)
