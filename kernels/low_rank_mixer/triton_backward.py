"""The Triton form of `low_rank_mixer`, backward; the formulas there, names and tiles as in low_rank_mixer_triton.py.

    library   d_low = gelu'(low) W2^T (scale g) of the tokens, in thin products
    rows      W1, W2, c2 of the tokens;  d_low of the channels;  da
    columns   W1, W2, c2 of the channels

With x = u + h what the tokens mix, x_hat its norm and q = d_low x_hat^T [s, n] the part of an image in d W1:

    dt [n, d] = W1^T [n, s] d_low [s, d]                         of x_hat
    dx        = rstd (dt - mean dt - x_hat mean(dt x_hat))       D mean dt = W1^T sum_d d_low; D mean(dt x_hat) = W1^T q
    dh        = scale g + dx                                     of h, what the channels add
    du_0      = dx + rstd (du - mean du - u_hat mean(du u_hat))  du = d_low W1 of the channels, that of u_hat

Gradients of factors are written in shares (of the tokens one an image, of the channels one a program, which takes
some of the images), and the shares are added in their order: no atomics.
"""

from __future__ import annotations

import functools

import torch

from .._triton import INTERPRET, tl, triton
from .triton import block_sizes, dot, merged_moments, normal_share, product, rstd_of, thin, vector


@triton.jit
def _norm_backward(d, x_hat, rstd, mean_d, mean_dx):
    """The gradient of a norm's input, from that of x_hat and the means of it and of its product with x_hat."""
    return rstd[:, None] * (d - mean_d[:, None] - x_hat * mean_dx[:, None])


@triton.jit
def _rows_bwd_kernel(
    grad, u, difference, da, stats, sums, share_down, share_up, share_bias, gate, scale,
    c_low, c_dlow, c_down, c_down_bias, c_down_sum, c_up, c_bias, t_low, t_dlow, t_dlow_sum, t_down, t_up, t_bias,
    N, D, R, S, cells, eps,
    TOKENS: tl.constexpr, FINAL: tl.constexpr, WRITE: tl.constexpr,
    GATED: tl.constexpr, SCALED: tl.constexpr, REPLACE: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """FINAL: da if WRITE, and the sums for scale and gate."""
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
def _columns_bwd_kernel(
    grad, u, stats, share_down, share_up, share_bias, scale, c_low, c_dlow, c_up, c_bias, t_dlow, t_down,
    P, N, D, R, S, cells,
    TOKENS: tl.constexpr, SCALED: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
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


@functools.lru_cache
def _processors(device: torch.device) -> int:
    """Of a GPU; in the interpreter few, so that a program meets more than one image."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def backward(grad, u, difference, lows, axes, combine, frames, gate, scale, factors, eps, needs_da):
    """As `low_rank_mixer_plain.backward`."""
    (P, N, D), grad, u, difference = u.shape, grad.contiguous(), u.contiguous(), difference.contiguous()
    factors, lows = [t.contiguous() for t in factors], [t.contiguous() for t in lows]
    tokens, R, S = len(axes) > 1, len(factors[0]), len(factors[-4])
    c_low, (c_down, c_down_bias, c_up, c_bias) = lows[0], factors[:4]
    t_low, (t_down, _, t_up, t_bias) = lows[-1], factors[-4:]  # without tokens never read
    t_dlow = t_dlow_sum = u
    if tokens:
        weights = (t_up if scale is None else scale * t_up).to(u.dtype).T.expand(P, -1, -1)
        t_dlow = torch.ops.aten.gelu_backward(torch.bmm(weights, grad), t_low)
        t_dlow_sum = t_dlow.sum(2, dtype=torch.float32)
    sizes = {"SCALED": scale is not None, "UPCAST_DOT": INTERPRET, "TOKENS": tokens}
    sizes |= block_sizes("low_rank_mixer_backward", u, R, S)
    num_n, num_d = triton.cdiv(N, sizes["BLOCK_N"]), triton.cdiv(D, sizes["BLOCK_D"])
    splits = max(1, min(P, 2 * _processors(u.device) // num_d))

    def shares(splits, rank, length):
        return [
            u.new_empty(splits, *shape, dtype=torch.float32) for shape in ((rank, length), (length, rank), (length,))
        ]

    of_channels, of_tokens = shares(splits, R, D), shares(P if tokens else 0, S, N)
    stats, sums = (u.new_empty(shape, dtype=torch.float32) for shape in ((6, P * N), (2, num_n * P)))
    c_dlow, da = torch.empty_like(c_low), u.new_empty(u.shape if needs_da else 0)
    at_scale = u if scale is None else scale
    with torch.cuda.device_of(u):
        _rows_bwd_kernel[(num_n * P,)](
            grad, u, difference, da, stats, sums, *of_tokens, u if gate is None else gate, at_scale,
            c_low, c_dlow, c_down, c_down_bias, c_down.to(u.dtype).sum(1, dtype=torch.float32), c_up, c_bias,
            t_low, t_dlow, t_dlow_sum, t_down, t_up, t_bias,
            N, D, R, S, P * N, eps,
            FINAL=needs_da or gate is not None or scale is not None, WRITE=needs_da,
            GATED=gate is not None, REPLACE=combine == "replace", **sizes,
        )  # fmt: skip
        _columns_bwd_kernel[(num_d * splits,)](
            grad, u, stats, *of_channels, at_scale, c_low, c_dlow, c_up, c_bias, t_dlow, t_down,
            P, N, D, R, S, P * N,
            **sizes,
        )  # fmt: skip
    d_down, d_up, d_bias = (share.sum(0) for share in of_channels)
    d_factors = [d_down, c_dlow.sum((0, 1), dtype=torch.float32), d_up, d_bias]
    if tokens:
        d_down, d_up, d_bias = (share.sum(0) for share in of_tokens)
        d_factors += [d_down, t_dlow_sum.sum(0), d_up, d_bias]
    d_factors = [d.to(f.dtype) for d, f in zip(d_factors, factors, strict=True)]
    d_scale, d_gate = sums.sum(1)
    if gate is not None:
        share = gate.sigmoid()
        d_gate = (share * (1 - share) * d_gate).to(gate.dtype)
    narrow = (None if gate is None else d_gate, None if scale is None else d_scale.to(scale.dtype))
    return da if needs_da else None, *narrow, d_factors
