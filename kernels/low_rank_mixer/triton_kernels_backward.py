"""Triton kernels of `low_rank_mixer`, backward; op.py has the formulas, names and tiles are those of triton_kernels.py.

    library   d_low = gelu'(low) W2^T (scale g) of the tokens, in thin products
    rows      W1, W2, c2 of the tokens;  d_low of the channels;  da
    columns   W1, W2, c2 of the channels

With x = u + h the input of the tokens' mixer, x_hat its norm and q = d_low x_hat^T [s, n] the part of an image in d W1:

    dt [n, d] = W1^T [n, s] d_low [s, d]                         of x_hat
    dx        = rstd (dt - mean dt - x_hat mean(dt x_hat))       D mean dt = W1^T sum_d d_low; D mean(dt x_hat) = W1^T q
    dh        = scale g + dx                                     of h, the change by the channels
    du_0      = dx + rstd (du - mean du - u_hat mean(du u_hat))  du = d_low W1 of the channels, that of u_hat

Gradients of factors are written in shares (of the tokens one an image, of the channels one a program, which takes
some of the images), and the shares are added in their order: no atomics.
"""

from __future__ import annotations

from .._triton import dot, tl, triton
from .triton_kernels import merged_moments, normal_share, product, rstd_of, thin, vector


@triton.jit
def _norm_backward(d, x_hat, rstd, mean_d, mean_dx):
    """Compute the gradient of a norm's input from d, that of x_hat, and the means of d and of d x_hat."""
    return rstd[:, None] * (d - mean_d[:, None] - x_hat * mean_dx[:, None])


@triton.jit
def rows_bwd_kernel(  # noqa: C901  (one program keeps a row's values in its registers)
    grad, u, difference, da, stats, sums, share_down, share_up, share_bias, gate, scale,
    c_low, c_dlow, c_down, c_down_bias, c_down_sum, c_up, c_bias, t_low, t_dlow, t_dlow_sum, t_down, t_up, t_bias,
    N, D, R, S, cells, eps,
    TOKENS: tl.constexpr, FINAL: tl.constexpr, WRITE: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, REPLACE: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute the channels' d_low and the tokens' shares; FINAL: da if WRITE, and the sums for scale and gate."""
    # lizard forgives: long, as statistics and thin products of a row stay in one program's registers over four passes
    tiles = tl.cdiv(N, BLOCK_N)
    p = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row, image, t_at = p * N, p * N * D, p * S * D
    r, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    factor, share = 1.0, 1.0
    if SCALED:
        factor = tl.load(scale).to(tl.float32)
    if GATED:
        share = 1.0 / (1.0 + tl.exp(-tl.load(gate).to(tl.float32)))
    zero = tl.zeros((BLOCK_N,), tl.float32)
    b_g = thin(u, c_low + row * R, n, r, N, R, R, 1, True)
    mean, square, mean_x, square_x = zero, zero, zero, zero
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32)
        mean, square = merged_moments(mean, square, x, mask, d0, D)
        if TOKENS:
            x += product(b_g, thin(u, c_up, r, d, R, D, 1, R), UPCAST_DOT) + vector(c_bias, d, D)[None, :]
            mean_x, square_x = merged_moments(mean_x, square_x, x, mask, d0, D)
    rstd, rstd_x = rstd_of(square, D, eps), rstd_of(square_x, D, eps)
    tl.store(stats + row + n, mean, mask=n < N)
    tl.store(stats + cells + row + n, rstd, mask=n < N)

    if TOKENS:
        b_t_down = thin(u, t_down, n, s, N, S, 1, N)
        q, acc_up, acc_bias = tl.zeros((BLOCK_N, BLOCK_S), tl.float32), tl.zeros((BLOCK_N, BLOCK_S), tl.float32), zero
        for d0 in tl.range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
            x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32)
            x += product(b_g, thin(u, c_up, r, d, R, D, 1, R), UPCAST_DOT) + vector(c_bias, d, D)[None, :]
            x_hat = tl.where(mask, (x - mean_x[:, None]) * rstd_x[:, None], 0.0).to(u.dtype.element_ty)
            q = dot(x_hat, thin(u, t_dlow + t_at, d, s, D, S, 1, D), q, UPCAST_DOT)
            b_d = tl.load(grad + image + at, mask=mask, other=0.0).to(tl.float32) * factor
            g_low = thin(u, t_low + t_at, d, s, D, S, 1, D, True)
            acc_up = dot(b_d.to(u.dtype.element_ty), g_low, acc_up, UPCAST_DOT)
            acc_bias += tl.sum(b_d, 1)
        inside, token = (n < N)[:, None] & (s < S)[None, :], p * S * N
        tl.store(share_down + token + s[None, :] * N + n[:, None], q, mask=inside)
        tl.store(share_up + token + n[:, None] * S + s[None, :], acc_up, mask=inside)
        tl.store(share_bias + row + n, acc_bias, mask=n < N)
        weights = b_t_down.to(tl.float32)
        mean_dt = tl.sum(weights * vector(t_dlow_sum + p * S, s, S)[None, :], 1) / D
        mean_dtx = tl.sum(weights * q, 1) / D
        tl.store(stats + 2 * cells + row + n, mean_x, mask=n < N)
        tl.store(stats + 3 * cells + row + n, rstd_x, mask=n < N)
        tl.store(stats + 4 * cells + row + n, mean_dt, mask=n < N)
        tl.store(stats + 5 * cells + row + n, mean_dtx, mask=n < N)

    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for d0 in tl.range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
        dh = tl.load(grad + image + at, mask=mask, other=0.0).to(tl.float32) * factor
        if TOKENS:
            x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32)
            x += product(b_g, thin(u, c_up, r, d, R, D, 1, R), UPCAST_DOT) + vector(c_bias, d, D)[None, :]
            x_hat = tl.where(mask, (x - mean_x[:, None]) * rstd_x[:, None], 0.0)
            dt = product(b_t_down, thin(u, t_dlow + t_at, s, d, S, D, D, 1), UPCAST_DOT)
            dh += tl.where(mask, _norm_backward(dt, x_hat, rstd_x, mean_dt, mean_dtx), 0.0)
        acc = dot(dh.to(u.dtype.element_ty), thin(u, c_up, d, r, D, R, R, 1), acc, UPCAST_DOT)
    ranks, low_at = (n < N)[:, None] & (r < R)[None, :], n[:, None] * R + r[None, :]
    b_low = tl.load(c_low + row * R + low_at, mask=ranks, other=0.0).to(tl.float32)
    slope = normal_share(b_low) + 0.3989422804014327 * b_low * tl.exp2(-0.7213475204444817 * b_low * b_low)
    b_dlow = tl.where(ranks, acc * slope, 0.0).to(u.dtype.element_ty)
    tl.store(c_dlow + row * R + low_at, b_dlow, mask=ranks)
    mean_du = tl.sum(b_dlow.to(tl.float32) * vector(c_down_sum, r, R)[None, :], 1) / D
    mean_dux = tl.sum(b_dlow.to(tl.float32) * (b_low - vector(c_down_bias, r, R)[None, :]), 1) / D

    if FINAL:
        sum_scale, sum_gate = zero, zero
        for d0 in tl.range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
            b_d = tl.load(grad + image + at, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32)
            u_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            du = product(b_dlow, thin(u, c_down, r, d, R, D, D, 1), UPCAST_DOT)
            du = tl.where(mask, _norm_backward(du, u_hat, rstd, mean_du, mean_dux), 0.0)
            if TOKENS or SCALED:
                h = product(b_g, thin(u, c_up, r, d, R, D, 1, R), UPCAST_DOT) + vector(c_bias, d, D)[None, :]
            if TOKENS:
                x_hat = tl.where(mask, (x + h - mean_x[:, None]) * rstd_x[:, None], 0.0)
                dt = product(b_t_down, thin(u, t_dlow + t_at, s, d, S, D, D, 1), UPCAST_DOT)
                du += tl.where(mask, _norm_backward(dt, x_hat, rstd_x, mean_dt, mean_dtx), 0.0)
            if SCALED:
                if TOKENS:
                    g_low = thin(u, t_low + t_at, s, d, S, D, D, 1, True)
                    h += product(thin(u, t_up, n, s, N, S, S, 1), g_low, UPCAST_DOT) + vector(t_bias, n, N)[:, None]
                sum_scale += tl.sum(tl.where(mask, b_d * h, 0.0), 1)
            if GATED:
                sum_gate += tl.sum(du * tl.load(difference + image + at, mask=mask, other=0.0).to(tl.float32), 1)
                du *= 1.0 - share
            if WRITE:
                if not REPLACE:
                    du += b_d
                tl.store(da + image + at, du.to(da.dtype.element_ty), mask=mask)
        if SCALED:
            tl.store(sums + tl.program_id(0), tl.sum(sum_scale))
        if GATED:
            tl.store(sums + tl.num_programs(0) + tl.program_id(0), tl.sum(sum_gate))


@triton.jit
def columns_bwd_kernel(
    grad, u, stats, share_down, share_up, share_bias, scale, c_low, c_dlow, c_up, c_bias, t_dlow, t_down,
    P, N, D, R, S, cells,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of the channels' W1, W2 and c2 over some images, for some channels."""
    # lizard forgives: long, as one program holds three sums in its registers
    tiles, splits = tl.cdiv(D, BLOCK_D), tl.num_programs(0) // tl.cdiv(D, BLOCK_D)
    split = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    r, s = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S)
    factor = 1.0
    if SCALED:
        factor = tl.load(scale).to(tl.float32)
    b_up, b_bias = thin(u, c_up, r, d, R, D, 1, R), vector(c_bias, d, D)[None, :]
    acc_down, acc_up = tl.zeros((BLOCK_R, BLOCK_D), tl.float32), tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    acc_bias = tl.zeros((BLOCK_D,), tl.float32)
    for p in tl.range(split, P, splits):
        row, image = p * N, p * N * D
        if TOKENS:
            b_t_dlow = thin(u, t_dlow + p * S * D, s, d, S, D, D, 1)
        for n0 in tl.range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            mask, at = (n < N)[:, None] & (d < D)[None, :], n[:, None] * D + d[None, :]
            b_g = thin(u, c_low + row * R, n, r, N, R, R, 1, True)
            dh = tl.load(grad + image + at, mask=mask, other=0.0).to(tl.float32) * factor
            x = tl.load(u + image + at, mask=mask, other=0.0).to(tl.float32)
            mean, rstd = vector(stats + row, n, N), vector(stats + cells + row, n, N)
            u_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0).to(u.dtype.element_ty)
            if TOKENS:
                x += product(b_g, b_up, UPCAST_DOT) + b_bias
                mean_x, rstd_x = vector(stats + 2 * cells + row, n, N), vector(stats + 3 * cells + row, n, N)
                mean_dt, mean_dtx = vector(stats + 4 * cells + row, n, N), vector(stats + 5 * cells + row, n, N)
                x_hat = tl.where(mask, (x - mean_x[:, None]) * rstd_x[:, None], 0.0)
                dt = product(thin(u, t_down, n, s, N, S, 1, N), b_t_dlow, UPCAST_DOT)
                dh += tl.where(mask, _norm_backward(dt, x_hat, rstd_x, mean_dt, mean_dtx), 0.0)
            acc_bias += tl.sum(dh, 0)
            acc_up = dot(dh.to(u.dtype.element_ty).T, b_g, acc_up, UPCAST_DOT)
            acc_down = dot(thin(u, c_dlow + row * R, r, n, R, N, 1, R), u_hat, acc_down, UPCAST_DOT)
    mask, ranks = (d < D)[:, None] & (r < R)[None, :], (r < R)[:, None] & (d < D)[None, :]
    tl.store(share_down + split * R * D + r[:, None] * D + d[None, :], acc_down, mask=ranks)
    tl.store(share_up + split * R * D + d[:, None] * R + r[None, :], acc_up, mask=mask)
    tl.store(share_bias + split * D + d, acc_bias, mask=d < D)
