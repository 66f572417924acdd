"""Layer norm, bare or with a trained scale and shift, with what a frozen block wants in the same pass.

    h     = x + residual                          the new residual stream, rounded to the dtype of x
    x_hat = (h - mean) * rstd                     mean and rstd = 1 / sqrt(var + eps) over the row, in fp32
    y     = x_hat        or  x_hat * weight + bias
    s     = y A^T                                 of a LoRA on the next layer (bare form only)
    q     = y in e4m3 with row scales             for an fp8 product (quantize.py)

M tokens, K width, R rank. Bare is the form of a frozen model whose scale and shift are folded into the next weight.

Backward, with g = dy (* weight) + ds A:
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dh          the same for x and residual
    dweight = sum dy * x_hat    dbias = sum dy    dA = ds^T y

Kept for backward: bare: y = x_hat and rstd (2 K + 4 bytes a token in 16 bit). With a weight: h, mean and rstd.
Bytes moved an entry in 16 bit: forward 2 in, 2 out (+ 2 + 2 with a residual, + 1 for q); backward 4 in, 2 out
(+ 2 with dh). Eager makes passes of their own of the sum, the product with A^T and the quantisation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import NAMESPACE, choose
from ._tiles import row_tile
from ._triton import INTERPRET, tl, triton
from .quantize import E4M3, e4m3_codes, native_fp8, quantize_reference, row_reason, row_scales

# beyond these s is a product of its own: 16 rows, or A's rows, would not fit a program
MAX_FUSED_WIDTH, MAX_FUSED_RANK = 1024, 64
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Normalised(NamedTuple):
    """What one pass over x [..., K] gave; None where not asked for."""

    y: Tensor | None
    h: Tensor
    mean: Tensor
    rstd: Tensor
    s: Tensor | None
    q: Tensor | None
    scale: Tensor | None


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The specification: (y, h), with statistics in fp32 or wider; differentiable by autograd."""
    h, wide = x if residual is None else x + residual, _wide(x)
    scale, shift = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(h.to(wide), h.shape[-1:], scale, shift, eps).to(x.dtype), h


def layer_norm_backward_reference(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor | None = None, grad_h: Tensor | None = None
) -> Tensor:
    """dx of the formula above, in fp32 or wider, rounded to the dtype of `grad`."""
    wide = _wide(grad)
    g, x_hat = grad.to(wide) if weight is None else grad.to(wide) * weight.to(wide), x_hat.to(wide)
    dx = g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True)
    dx = rstd.to(wide)[..., None] * dx
    return (dx if grad_h is None else dx + grad_h.to(wide)).to(grad.dtype)


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
    KEEP: tl.constexpr, FP8: tl.constexpr, NATIVE_FP8: tl.constexpr, UPCAST_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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
    if KEEP:
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
    grad, kept, mean, rstd, weight, grad_h, dx, dweight, dbias, q, scale,
    M, K,
    BARE: tl.constexpr, HAS_GRAD_H: tl.constexpr, SUMS: tl.constexpr,
    FP8: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx, and with SUMS each program's share of dweight and dbias [programs, K]. BARE: `kept` is x_hat, else h."""
    k = tl.arange(0, BLOCK_K)
    if not BARE:
        b_w = tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    sum_w, sum_b = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        mask = (m < M)[:, None] & (k < K)[None, :]
        b_g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        b_x = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
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


def _fwd_triton(x, residual, weight, bias, lora_a, eps, keep, fp8, native):
    (M, K), R = x.shape, 0 if lora_a is None else lora_a.shape[0]
    fused = 0 < R <= MAX_FUSED_RANK and K <= MAX_FUSED_WIDTH
    x, residual, weight, bias, a = (None if t is None else t.contiguous() for t in (x, residual, weight, bias, lora_a))
    y, h, mean, rstd, s, q, scale = _outputs(x, residual, a, keep or (R > 0 and not fused), fp8)
    tiles = row_tile("layer_norm", x.device, K, fewest=16 if fused else 1)
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(M, tiles["BLOCK_M"]),)](
            x, x if residual is None else residual, x if weight is None else weight, x if bias is None else bias,
            a if fused else x, y, h, mean, rstd, s, q, scale,
            M, K, R, eps,
            HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, LORA=fused,
            KEEP=y.numel() > 0, FP8=fp8, NATIVE_FP8=native, UPCAST_DOT=INTERPRET,
            BLOCK_R=max(16, 1 << max(R - 1, 0).bit_length()) if fused else 16, CHUNK=64, **tiles,
        )  # fmt: skip
    if R and not fused:
        torch.mm(y, a.T, out=s)
    return y if keep else x.new_empty(0), h, mean, rstd, s, q, scale


def _bwd_triton(grad, kept, mean, rstd, weight, grad_h, sums, fp8, native, processors):
    (M, K), tiles = grad.shape, row_tile("layer_norm", grad.device, grad.shape[1])
    grad, kept, weight, grad_h = (None if t is None else t.contiguous() for t in (grad, kept, weight, grad_h))
    blocks = triton.cdiv(M, tiles["BLOCK_M"])
    programs = min(blocks, 4 * processors) if sums else blocks
    dx, q = torch.empty_like(grad), grad.new_empty(grad.shape if fp8 else 0, dtype=torch.uint8)
    scale = grad.new_empty((M, 1) if fp8 else 0, dtype=torch.float32)
    shares = grad.new_empty(2, programs if sums else 0, K, dtype=torch.float32)
    with torch.cuda.device_of(grad):
        _layer_norm_bwd_kernel[(programs,)](
            grad, kept, mean, rstd, grad if weight is None else weight, grad if grad_h is None else grad_h,
            dx, shares[0], shares[1], q, scale,
            M, K,
            BARE=weight is None, HAS_GRAD_H=grad_h is not None, SUMS=sums, FP8=fp8, NATIVE_FP8=native, **tiles,
        )  # fmt: skip
    dweight, dbias = (share.sum(0) if sums else share.new_empty(0) for share in shares)
    return dx, dweight, dbias, q, scale


def _outputs(x, residual, lora_a, keep, fp8):
    """y, h, mean, rstd, s, q (its bytes: autograd cannot add fp8), scale: empty where not asked for."""
    M, K = x.shape
    return (
        x.new_empty((M, K) if keep else 0),
        x.new_empty(0 if residual is None else (M, K)),
        x.new_empty(M, dtype=_wide(x)),
        x.new_empty(M, dtype=_wide(x)),
        x.new_empty(0 if lora_a is None else (M, lora_a.shape[0])),
        x.new_empty((M, K) if fp8 else 0, dtype=torch.uint8),
        x.new_empty((M, 1) if fp8 else 0, dtype=torch.float32),
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _takes_triton(op: str, x: Tensor) -> bool:
    why_not = "no float64 form" if x.dtype == torch.float64 else row_reason(x.shape[1], x)
    return x.numel() > 0 and choose(op, x.device, {"triton": why_not, "reference": None}) == "triton"


@torch.library.custom_op(f"{NAMESPACE}::layer_norm", mutates_args=())
def _op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None,
    eps: float, keep: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _takes_triton("layer_norm", x):
        return _fwd_triton(x, residual, weight, bias, lora_a, eps, keep, fp8, native_fp8(x.device))
    y, h, mean, rstd, s, q, scale = _outputs(x, residual, lora_a, keep, fp8)
    with torch.autocast(x.device.type, enabled=False):
        value, total = layer_norm_reference(x, weight, bias, eps, residual)
        wide = total.to(_wide(x))
        mean.copy_(wide.mean(1))
        rstd.copy_((wide.var(1, correction=0) + eps).rsqrt())
        if keep:
            y.copy_(value)
        if residual is not None:
            h.copy_(total)
        if lora_a is not None:
            torch.mm(value, lora_a.T, out=s)
        if fp8:
            exact = layer_norm_reference(total.float(), weight, bias, eps)[0]
            codes, scale = quantize_reference(exact)
            q = codes.view(torch.uint8)
    return y, h, mean, rstd, s, q, scale


@_op.register_fake
def _(x, residual, weight, bias, lora_a, eps, keep, fp8):
    return _outputs(x, residual, lora_a, keep, fp8)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_backward", mutates_args=())
def _backward_op(
    grad: Tensor, kept: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, grad_h: Tensor | None,
    sums: bool, fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias, q, scale): the sums, in fp32, are empty unless `sums`; q and scale unless `fp8`."""
    if _takes_triton("layer_norm_backward", grad):
        device = grad.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return _bwd_triton(grad, kept, mean, rstd, weight, grad_h, sums, fp8, native_fp8(device), processors)
    dx, dweight, dbias, q, scale = _gradients(grad, kept, mean, rstd, weight, grad_h, sums, fp8)
    x_hat = kept if weight is None else (kept.to(_wide(grad)) - mean[:, None]) * rstd[:, None]
    dx.copy_(layer_norm_backward_reference(grad, x_hat, rstd, weight, grad_h))
    if sums:
        torch.sum(grad.to(_wide(grad)) * x_hat, 0, out=dweight)
        torch.sum(grad.to(_wide(grad)), 0, out=dbias)
    if fp8:
        exact = layer_norm_backward_reference(grad.float(), x_hat, rstd, weight, grad_h)
        codes, scale = quantize_reference(exact.contiguous())
        q = codes.view(torch.uint8)
    return dx, dweight, dbias, q, scale


@_backward_op.register_fake
def _gradients(grad, kept, mean, rstd, weight, grad_h, sums, fp8):
    M, K = grad.shape
    return (
        grad.new_empty(M, K),
        grad.new_empty(K if sums else 0, dtype=_wide(grad)),
        grad.new_empty(K if sums else 0, dtype=_wide(grad)),
        grad.new_empty((M, K) if fp8 else 0, dtype=torch.uint8),
        grad.new_empty((M, 1) if fp8 else 0, dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, lora_a = inputs[:5]
    y, h, mean, rstd = output[:4]
    ctx.set_materialize_grads(False)
    kept = y if weight is None else x if residual is None else h
    ctx.save_for_backward(kept, mean, rstd, weight, lora_a)
    ctx.has_residual = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad, grad_h, _mean, _rstd, grad_s, *_):
    kept, mean, rstd, weight, lora_a = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, need_a = ctx.needs_input_grad[:5]
    dx = dweight = dbias = da = None
    # the stand-ins of outputs that were not asked for may be used too, by who takes all outputs alike
    grad_h = grad_h if ctx.has_residual else None
    if grad_s is not None and lora_a is not None:
        through_s = grad_s.to(lora_a.dtype) @ lora_a
        grad = through_s.to(kept.dtype) if grad is None else grad + through_s
        da = grad_s.T @ kept if need_a else None
    if grad is None:
        dx = grad_h
    elif need_x or need_residual or need_weight or need_bias:
        sums = need_weight or need_bias
        dx, dweight, dbias, _, _ = _backward_op(grad, kept, mean, rstd, weight, grad_h, sums, False)
        dweight = dweight.to(weight.dtype) if need_weight else None
        dbias = dbias.to(ctx.bias_dtype) if need_bias else None
    return dx if need_x else None, dx if need_residual else None, dweight, dbias, da, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) [* weight [+ bias]] over the last dimension of x [..., K].

    x: fp16, bf16, fp32 or fp64; weight, bias: [K], in the dtype of x or in fp32 (then so are their gradients).
    Returns the dtype of x, with or without autocast; statistics are in fp32. Raises ValueError for what does not fit.
    """
    return _normalise("layer_norm", x, None, weight, bias, None, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(layer_norm(h, weight, bias, eps), h) with h = x + residual, in one pass. Arguments as `layer_norm`."""
    return _normalise("add_layer_norm", x, residual, weight, bias, None, eps)[:2]


def layer_norm_forward(
    x: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    lora_a: Tensor | None = None,
    keep: bool = True,
    fp8: bool = False,
) -> Normalised:
    """The bare form and all that one pass can give with it; gradients reach x, residual and lora_a.

    x, residual: [..., K]; lora_a: [R, K] in the dtype of x: also s = y lora_a^T [..., R].
    keep: whether y is wanted (`layer_norm_backward` takes it). fp8: also q [..., K] in e4m3 with scale [..., 1].
    Raises ValueError for what does not fit.
    """
    y, h, mean, rstd, s, q, scale = _normalise(
        "layer_norm_forward", x, residual, None, None, lora_a, eps, keep=keep, fp8=fp8
    )
    s = None if lora_a is None else s
    return Normalised(y if keep else None, h, mean, rstd, s, q.view(E4M3) if fp8 else None, scale if fp8 else None)


def layer_norm_backward(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, grad_h: Tensor | None = None, *, fp8: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, q, scale) of the bare form, for a backward written by hand.

    grad: of x_hat, [..., K]; x_hat and rstd [...] as `layer_norm_forward` gave them; grad_h: of the residual stream,
    added in the same pass. fp8: also dx in e4m3 with row scales; else q and scale are None.
    """
    for name, t, shape in (
        ("x_hat", x_hat, grad.shape),
        ("rstd", rstd, grad.shape[:-1]),
        ("grad_h", grad_h, grad.shape),
    ):
        if t is not None and (t.shape != shape or t.device != grad.device):
            want, got = f"{list(shape)} on {grad.device}", f"{list(t.shape)} on {t.device}"
            raise ValueError(f"layer_norm_backward: {name} must be {want} to fit grad, got {got}")
    flat = (None if t is None else _rows(t.detach(), grad.shape[-1]) for t in (grad, x_hat, grad_h))
    grad_MK, x_hat_MK, grad_h_MK = flat
    rstd = rstd.detach().reshape(-1)
    dx, _, _, q, scale = _backward_op(grad_MK, x_hat_MK, rstd, rstd, None, grad_h_MK, False, fp8)
    if not fp8:
        return dx.view(grad.shape), None, None
    return dx.view(grad.shape), q.view(E4M3).view(grad.shape), scale.view(*grad.shape[:-1], 1)


def _normalise(op, x, residual, weight, bias, lora_a, eps, keep=True, fp8=False) -> tuple[Tensor, ...]:
    if message := _complaint(x, residual, weight, bias, lora_a, eps, fp8):
        raise ValueError(f"{op}: {message}")
    K, lead = x.shape[-1], x.shape[:-1]
    flat = None if residual is None else _rows(residual, K)
    keep = keep or (torch.is_grad_enabled() and x.requires_grad)
    y, h, mean, rstd, s, q, scale = _op(_rows(x, K), flat, weight, bias, lora_a, float(eps), keep, fp8)
    h = x if residual is None else h.view(x.shape)
    shapes = ((y, keep, K), (s, lora_a is not None, -1), (q, fp8, K), (scale, fp8, 1))
    y, s, q, scale = (t.view(*lead, t.shape[-1] if last < 0 else last) if given else t for t, given, last in shapes)
    return y, h, mean.view(lead), rstd.view(lead), s, q, scale


def _rows(x: Tensor, K: int) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), K)


def _complaint(x, residual, weight, bias, lora_a, eps, fp8) -> str | None:
    if x.dtype not in _DTYPES[: 3 if fp8 else 4] or x.dim() == 0:
        return f"x must be [..., K] in fp16, bf16, fp32{'' if fp8 else ' or fp64'}, got {list(x.shape)} in {x.dtype}"
    if not eps > 0:
        return f"eps must be above 0, got {eps}"
    if bias is not None and weight is None:
        return "bias wants a weight, got None"
    K, either = x.shape[-1], (x.dtype, torch.float32)
    rank = lora_a.shape[0] if lora_a is not None and lora_a.dim() == 2 else 1
    wanted = (
        ("residual", residual, x.shape, (x.dtype,)),
        ("weight", weight, (K,), either),
        ("bias", bias, (K,), either),
        ("lora_a", lora_a, (rank, K), (x.dtype,)),
    )
    for name, t, shape, dtypes in wanted:
        if t is not None and (t.shape != tuple(shape) or t.dtype not in dtypes or t.device != x.device):
            want = f"{list(shape)} in {' or '.join(map(str, dict.fromkeys(dtypes)))} on {x.device}"
            return f"{name} must be {want} to fit x, got {list(t.shape)} in {t.dtype} on {t.device}"
    return None
