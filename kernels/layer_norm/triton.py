"""Triton form of `layer_norm`: one kernel forward, one backward, a block of whole rows a program."""

from __future__ import annotations

import torch
from torch import Tensor

from .._tile_sizes import row_tile
from .._triton import INTERPRET, cdiv, launch, on_device_of, pointers, tl, triton
from ..quantize import e4m3_codes, row_scales

# beyond these s is a product of its own: 16 rows, or A's rows, would not fit a program
MAX_FUSED_WIDTH, MAX_FUSED_RANK = 1024, 64


@triton.jit
def _load_h(x, residual, at, mask, HAS_RESIDUAL: tl.constexpr):
    b_h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_h = (b_h + tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    return b_h


@triton.jit
def _layer_norm_fwd_kernel(
    x, residual, weight, bias, a, y, h, mean, rstd, s, q, scale,
    M, K, R, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, LORA: tl.constexpr,
    STORE_Y: tl.constexpr, FP8: tl.constexpr, NATIVE_FP8: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Normalize BLOCK_M whole rows of x (+ residual); s, q and their scale in the same pass."""
    # lizard forgives: long, as the rows stay in the registers of one program
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    start = m.to(tl.int64)[:, None] * K
    mask = (m < M)[:, None] & (k < K)[None, :]
    b_h = _load_h(x, residual, start + k[None, :], mask, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(h + start + k[None, :], b_h.to(h.dtype.element_ty), mask=mask)
    b_mean = tl.sum(b_h, 1) / K
    b_y = tl.where(mask, b_h - b_mean[:, None], 0.0)
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(b_y * b_y, 1) / K + eps))
    tl.store(mean + m, b_mean, mask=m < M)
    tl.store(rstd + m, b_rstd, mask=m < M)
    b_y *= b_rstd[:, None]
    if HAS_WEIGHT:
        b_y *= tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        b_y += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if STORE_Y:
        tl.store(y + start + k[None, :], b_y.to(y.dtype.element_ty), mask=mask)
    if FP8:
        b_scale, b_inverse = row_scales(b_y)
        tl.store(q + start + k[None, :], e4m3_codes(b_y * b_inverse[:, None], NATIVE_FP8), mask=mask)
        tl.store(scale + m, b_scale, mask=m < M)
    if LORA:
        # the rows once more, from the cache: a product takes its operands in slices
        r = tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in tl.range(0, K, CHUNK):
            c = k0 + tl.arange(0, CHUNK)
            inside = (m < M)[:, None] & (c < K)[None, :]
            b_c = _load_h(x, residual, start + c[None, :], inside, HAS_RESIDUAL)
            b_c = tl.where(inside, (b_c - b_mean[:, None]) * b_rstd[:, None], 0.0).to(x.dtype.element_ty)
            b_a = tl.load(a + r[None, :] * K + c[:, None], mask=(r < R)[None, :] & (c < K)[:, None], other=0.0)
            if UPCAST_DOT:
                b_c, b_a = b_c.to(tl.float32), b_a.to(tl.float32)
            acc = tl.dot(b_c, b_a, acc, input_precision="ieee")
        at = s + m.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(at, acc.to(s.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _layer_norm_bwd_kernel(
    grad, saved, mean, rstd, weight, grad_h, dx, dweight, dbias, q, scale,
    M, K,
    BARE: tl.constexpr, HAS_GRAD_H: tl.constexpr, SUMS: tl.constexpr,
    FP8: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dx, and with SUMS a share of dweight and dbias [programs, K]. BARE: `saved` is x_hat, else h."""
    k = tl.arange(0, BLOCK_K)
    if not BARE:
        b_w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    sum_w, sum_b = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        mask = (m < M)[:, None] & (k < K)[None, :]
        b_g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(saved + at, mask=mask, other=0.0).to(tl.float32)
        b_rstd = tl.load(rstd + m, mask=m < M, other=0.0)[:, None]
        if not BARE:
            b_x = tl.where(mask, (b_x - tl.load(mean + m, mask=m < M, other=0.0)[:, None]) * b_rstd, 0.0)
            if SUMS:
                sum_w += tl.sum(b_g * b_x, 0)
                sum_b += tl.sum(b_g, 0)
            b_g *= b_w
        b_dx = b_rstd * (b_g - (tl.sum(b_g, 1) / K)[:, None] - b_x * (tl.sum(b_g * b_x, 1) / K)[:, None])
        if HAS_GRAD_H:
            b_dx += tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=mask)
        if FP8:
            b_scale, b_inverse = row_scales(tl.where(mask, b_dx, 0.0))
            tl.store(q + at, e4m3_codes(b_dx * b_inverse[:, None], NATIVE_FP8), mask=mask)
            tl.store(scale + m, b_scale, mask=m < M)
    if SUMS:
        at = tl.program_id(0).to(tl.int64) * K + k
        tl.store(dweight + at, sum_w, mask=k < K)
        tl.store(dbias + at, sum_b, mask=k < K)


# y, h, mean, rstd, s, q (bytes: autograd cannot add fp8) and scale; None: not requested
Outputs = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias, q, scale


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    eps: float,
    save_y: bool,
    fp8: bool,
    native: bool,
) -> Outputs:
    """Return the outputs of the op `layer_norm`; native: the GPU itself rounds to e4m3."""
    K, R = x.shape[-1], 0 if lora_a is None else lora_a.shape[0]
    M = x.numel() // K
    is_fused = 0 < R <= MAX_FUSED_RANK and K <= MAX_FUSED_WIDTH
    x = x.contiguous()
    y, h, mean, rstd, s, q, scale = outputs(x, residual, lora_a, save_y or (R > 0 and not is_fused), fp8)
    residual_, weight_, bias_, a = (t.contiguous() for t in pointers(x, residual, weight, bias, lora_a))
    y_, h_, s_, q_, scale_ = pointers(x, y, h, s, q, scale)
    tiles = row_tile("layer_norm", x.device, K, fewest=16 if is_fused else 1)
    with on_device_of(x):
        launch(
            _layer_norm_fwd_kernel, cdiv(M, tiles["BLOCK_M"]),
            (x, residual_, weight_, bias_, a if is_fused else x, y_, h_, mean, rstd, s_, q_, scale_, M, K, R, eps),
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, LORA=is_fused,
            STORE_Y=y is not None, FP8=fp8, NATIVE_FP8=native, UPCAST_DOT=INTERPRET,
            BLOCK_R=max(16, 1 << max(R - 1, 0).bit_length()) if is_fused else 16, CHUNK=64, **tiles,
            enable_fp_fusion=True,
        )  # fmt: skip
    if y is not None and s is not None and not is_fused:
        torch.mm(y.view(M, K), a.T, out=s.view(M, R))
    return y if save_y else None, h, mean, rstd, s, q, scale


def backward(
    grad: Tensor,
    saved: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    grad_h: Tensor | None,
    sums: bool,
    fp8: bool,
    native: bool,
    processors: int,
) -> Gradients:
    """Return the outputs of the op `layer_norm_backward`; processors: of the GPU."""
    K = grad.shape[-1]
    M, tiles = grad.numel() // K, row_tile("layer_norm", grad.device, K)
    grad, saved = grad.contiguous(), saved.contiguous()
    weight_, grad_h_ = (t.contiguous() for t in pointers(grad, weight, grad_h))
    blocks = cdiv(M, tiles["BLOCK_M"])
    programs = min(blocks, 4 * processors) if sums else blocks
    dx, (q, scale) = torch.empty_like(grad), empty_codes(grad) if fp8 else (None, None)
    shares = grad.new_empty((2, programs, K), dtype=torch.float32) if sums else (None, None)
    of_weight, of_bias, q_, scale_ = pointers(grad, *shares, q, scale)
    with on_device_of(grad):
        launch(
            _layer_norm_bwd_kernel, programs,
            (grad, saved, mean, rstd, weight_, grad_h_, dx, of_weight, of_bias, q_, scale_, M, K),
            BARE=weight is None, HAS_GRAD_H=grad_h is not None, SUMS=sums, FP8=fp8, NATIVE_FP8=native, **tiles,
            enable_fp_fusion=True,
        )  # fmt: skip
    dweight, dbias = shares.sum(1) if isinstance(shares, Tensor) else shares
    return dx, dweight, dbias, q, scale


def outputs(x: Tensor, residual: Tensor | None, lora_a: Tensor | None, save_y: bool, fp8: bool) -> Outputs:
    """Return the outputs of the op `layer_norm`, empty."""
    lead, wide = x.shape[:-1], wide_dtype(x)
    return (
        x.new_empty(x.shape) if save_y else None,
        None if residual is None else x.new_empty(x.shape),
        x.new_empty(lead, dtype=wide),
        x.new_empty(lead, dtype=wide),
        None if lora_a is None else x.new_empty(*lead, lora_a.shape[0]),
        *(empty_codes(x) if fp8 else (None, None)),
    )


def empty_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty bytes for x in e4m3, and its row scales."""
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return fp32, or the type of x if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
