"""GELU with a backward that needs one byte an entry instead of the input.

    y = x P(x)        d = dy/dx        q = round(200 d + 26), a byte        dx = dy (q - 26) / 200

P(x) by `approximate`:
    none     Phi(x) = erfc(-x / sqrt 2) / 2         timm's and PyTorch's default
    tanh     sigmoid(2 u),  u = sqrt(2 / pi) (x + 0.044715 x^3)
    quick    sigmoid(1.702 x)                       CLIP

d lies in [-0.13, 1.13], so q lies in [0, 252]. The grid holds d = 0 and d = 1, where saturated entries lie, and rounds
the rest to nearest: RMS error 1.45e-3 (rounding d to bf16: 1.3e-3 for x ~ N(0, 1)). Its mean is 0 where x is as often
above 0 as below, since d(-x) = 1 - d(x) and the grid has the same symmetry; -5e-5 for x ~ N(-1, 1), from the flat
minimum of d. Backward is this rounded one in every dtype and implementation.

In 16 bit Phi comes from one exp2 and one division, which give the normal density of d too:
    Phi(-|x|) = t (c0 + c1 t + ... + c4 t^4) exp(-x^2 / 2) / 2,   t = 1 / (1 + 0.525 |x| / sqrt 2)
within 3.5e-5 of its own size everywhere (a minimax fit to erfc(z) exp(z^2); bf16 rounds by up to 2e-3). In fp32: erf.

fp8: y, or dx, as e4m3 with row scales, in the same pass (quantize.py).
Saved for backward: q. Bytes moved an entry in 16 bit: forward 2 in, 2 + 1 out (fp8: 1 + 1); backward 2 + 1 in, 2 out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call, define, filled
from ._dispatch import NAMESPACE, choose, triton_unsupported_reason
from ._tile_sizes import Tile, row_tile
from ._transforms import is_transformed, refuse_second_derivative
from ._triton import cdiv, launch, on_device_of, pointers, tl, triton
from .quantize import E4M3, e4m3_codes, native_fp8, quantize_reference, row_scales, row_unsupported_reason

APPROXIMATIONS = ("none", "tanh", "quick")
FLAT = 1024  # cells of a "row" where rows do not matter
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Outputs = tuple[Tensor, Tensor | None, Tensor | None]  # y, derivative, row scales; None: not requested


def gelu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """Compute the specification of the value in fp32 or wider; its autograd has the exact derivative."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.sigmoid(1.702 * wide) if approximate == "quick" else F.gelu(wide, approximate=approximate)
    return y.to(x.dtype)


def derivative_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """Compute the byte q of each entry's derivative."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-64, 64)
    if approximate == "none":
        share, density = torch.special.ndtr(x), torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        d = share + x * density
    else:
        slope = 1.702 if approximate == "quick" else math.sqrt(8 / math.pi) * (1 + 0.134145 * x.square())
        logit = 1.702 * x if approximate == "quick" else math.sqrt(8 / math.pi) * (x + 0.044715 * x.pow(3))
        share = torch.sigmoid(logit)
        d = share + x * share * (1 - share) * slope
    return (200 * d + 26).round().to(torch.uint8)


def gelu_backward_reference(grad: Tensor, derivative: Tensor) -> Tensor:
    """Compute dy (q - 26) / 200 in fp32 or wider, rounded to the dtype of `grad`."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * ((derivative.to(wide) - 26) / 200)).to(grad.dtype)


@triton.jit
def _share_and_derivative(x, APPROXIMATE: tl.constexpr, EXACT: tl.constexpr):
    # saturated beyond; an infinity times a zero would be NaN
    x = tl.clamp(x, -64.0, 64.0)
    if APPROXIMATE == "none":
        bell = tl.exp2(-0.7213475204444817 * x * x)
        if EXACT:
            share = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        else:
            t = 1.0 / (1.0 + 0.3712310601229375 * tl.abs(x))
            # the coefficients halved
            tail = (((-0.0902648 * t + 0.207154705) * t + 0.07831474) * t + 0.157349655) * t + 0.147459675
            tail = bell * t * tail
            share = tl.where(x < 0, tail, 1.0 - tail)
        derivative = share + 0.3989422804014327 * x * bell
    else:
        # logit and slope in units of log2, so that exp2 takes them as they are
        if APPROXIMATE == "tanh":
            logit = 2.302208198144325 * x * (1.0 + 0.044715 * x * x)
            slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        else:
            logit = 2.4554669595930146 * x
            slope = 1.702
        share = 1.0 / (1.0 + tl.exp2(-logit))
        derivative = share + x * slope * share * (1.0 - share)
    return share, derivative


@triton.jit
def _store(value, out, scale, m, at, mask, M, FP8: tl.constexpr, NATIVE_FP8: tl.constexpr):
    if FP8:
        b_scale, b_inverse = row_scales(tl.where(mask, value, 0.0))
        tl.store(out + at, e4m3_codes(value * b_inverse[:, None], NATIVE_FP8), mask=mask)
        tl.store(scale + m, b_scale, mask=m < M)
    else:
        tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_fwd_kernel(
    x, y, derivative, scale,
    size, M, K,
    APPROXIMATE: tl.constexpr, EXACT: tl.constexpr, STORE_DERIVATIVE: tl.constexpr,
    FP8: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    mask = (k < K)[None, :] & (at < size)
    b_x = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    share, b_d = _share_and_derivative(b_x, APPROXIMATE, EXACT)
    if STORE_DERIVATIVE:
        # the last bit of a number at 2^23 is 1: the low byte is the integer, rounded to nearest
        code = (200.0 * b_d + (8388608.0 + 26.0)).to(tl.int32, bitcast=True)
        tl.store(derivative + at, code.to(tl.uint8), mask=mask)
    _store(b_x * share, y, scale, m, at, mask, M, FP8, NATIVE_FP8)


@triton.jit
def _gelu_bwd_kernel(
    grad, derivative, dx, scale,
    size, M, K,
    FP8: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    mask = (k < K)[None, :] & (at < size)
    b_g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    b_d = (tl.load(derivative + at, mask=mask, other=0).to(tl.float32) - 26.0) * 0.005
    _store(b_g * b_d, dx, scale, m, at, mask, M, FP8, NATIVE_FP8)


def _gelu_fwd_triton(x: Tensor, approximate: str, save_derivative: bool, fp8: bool, native: bool) -> Outputs:
    x = x.contiguous()
    y, derivative, scale = _outputs(x, save_derivative, fp8)
    M, K, tiles = _rows(x, fp8)
    with on_device_of(x):
        launch(
            _gelu_fwd_kernel, cdiv(M, tiles["BLOCK_M"]),
            (x, y.view(torch.uint8) if fp8 else y, *pointers(x, derivative, scale), x.numel(), M, K),
            APPROXIMATE=approximate, EXACT=x.dtype == torch.float32, STORE_DERIVATIVE=save_derivative,
            FP8=fp8, NATIVE_FP8=native, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return y, derivative, scale


def _gelu_bwd_triton(grad: Tensor, derivative: Tensor, fp8: bool, native: bool) -> tuple[Tensor, Tensor | None]:
    grad, derivative = grad.contiguous(), derivative.contiguous()
    dx, _, scale = _outputs(grad, False, fp8)
    M, K, tiles = _rows(grad, fp8)
    with on_device_of(grad):
        launch(
            _gelu_bwd_kernel, cdiv(M, tiles["BLOCK_M"]),
            (grad, derivative, dx.view(torch.uint8) if fp8 else dx, *pointers(grad, scale), grad.numel(), M, K),
            FP8=fp8, NATIVE_FP8=native, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, scale


def _rows(x: Tensor, fp8: bool) -> tuple[int, int, Tile]:
    K = x.shape[-1] if fp8 else FLAT
    return cdiv(x.numel(), K), K, row_tile("gelu", x.device, K)


def _outputs(x: Tensor, save_derivative: bool, fp8: bool) -> Outputs:
    """Return empty outputs of the op `gelu`."""
    return (
        x.new_empty(x.shape, dtype=E4M3 if fp8 else x.dtype),
        x.new_empty(x.shape, dtype=torch.uint8) if save_derivative else None,
        x.new_empty(*x.shape[:-1], 1, dtype=torch.float32) if fp8 else None,
    )


def _takes_triton(op: str, x: Tensor, fp8: bool) -> bool:
    reason = row_unsupported_reason(x.shape[-1], x) if fp8 else triton_unsupported_reason(x)
    reason = "no float64 form" if x.dtype == torch.float64 else reason
    return x.numel() > 0 and choose(op, x.device, {"triton": reason, "reference": None}) == "triton"


def _quantized(value: Tensor, fp8: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return quantize_reference(value) if fp8 else (value.to(dtype), None)


def _forward(x: Tensor, approximate: str, save_derivative: bool, fp8: bool) -> Outputs:
    if _takes_triton("gelu", x, fp8):
        return _gelu_fwd_triton(x, approximate, save_derivative, fp8, native_fp8(x.device))
    x = x.contiguous()
    y, scale = _quantized(gelu_reference(x.float() if fp8 else x, approximate), fp8, x.dtype)
    byte = derivative_reference(x, approximate) if save_derivative else None
    return y, byte, scale


def _fake_forward(x: Tensor, approximate: str, save_derivative: bool, fp8: bool) -> Outputs:
    return _outputs(x, save_derivative, fp8)


def _gelu_backward(grad: Tensor, derivative: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Return (dx, row scales, None unless `fp8`)."""
    if _takes_triton("gelu_backward", grad, fp8):
        return _gelu_bwd_triton(grad, derivative, fp8, native_fp8(grad.device))
    grad, derivative = grad.contiguous(), derivative.contiguous()
    return _quantized(gelu_backward_reference(grad.float() if fp8 else grad, derivative), fp8, grad.dtype)


def _fake_backward(grad: Tensor, derivative: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    dx, _, scale = _outputs(grad, False, fp8)
    return dx, scale


_SCHEMA = "(Tensor x, str approximate, bool save_derivative, bool fp8) -> (Tensor, Tensor, Tensor)"
_gelu_op = torch.library.custom_op(f"{NAMESPACE}::gelu", filled(_forward), mutates_args=(), schema=_SCHEMA)
_gelu_op.register_fake(filled(_fake_forward))
_gelu_forward_op = define(f"gelu_forward{_SCHEMA}", _forward, _fake_forward)
_gelu_backward_op = define(
    "gelu_backward(Tensor grad, Tensor derivative, bool fp8) -> (Tensor, Tensor)", _gelu_backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None
    refuse_second_derivative("gelu")
    return _gelu_backward_op(grad, ctx.saved_tensors[0], False)[0], None, None, None


_gelu_op.register_autograd(_backward, setup_context=_setup_context)


def _validate(op: str, x: Tensor, approximate: str, fp8: bool = False, name: str = "x") -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"{op}: approximate must be one of {', '.join(APPROXIMATIONS)}, got {approximate!r}")
    if x.dtype not in _DTYPES[: 3 if fp8 else 4]:
        raise ValueError(f"{op}: {name} must be fp16, bf16, fp32{'' if fp8 else ' or fp64'}, got {x.dtype}")
    if fp8 and x.dim() == 0:
        raise ValueError(f"{op}: {name} must be [..., K] for fp8, got a scalar")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Compute GELU of x (any shape; fp16, bf16, fp32 or fp64) in the dtype of x, with or without autocast.

    approximate: "none" (erf), "tanh" or "quick" (CLIP). One byte an entry is saved for backward; its derivative is
    right to 1/400 and unbiased. Raises ValueError for another dtype or approximation.
    """
    _validate("gelu", x, approximate)
    if is_transformed("gelu", x):
        return gelu_reference(x, approximate)
    return _gelu_op(x, approximate, torch.is_grad_enabled() and x.requires_grad, False)[0]


def gelu_forward(
    x: Tensor, approximate: str = "none", *, save_derivative: bool = True, fp8: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (y, derivative byte or None, row scales or None), for a backward written by hand; outside autograd.

    save_derivative: whether to return the byte, which `gelu_backward` takes. fp8: y as e4m3 with row scales [..., 1].
    """
    _validate("gelu_forward", x, approximate, fp8)
    y, derivative, scale = call(_gelu_forward_op, _forward, x.detach(), approximate, save_derivative, fp8)
    return y, derivative if save_derivative else None, scale if fp8 else None


def gelu_backward(grad: Tensor, derivative: Tensor, *, fp8: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return (dx, row scales or None) from the gradient of y and the byte of `gelu_forward`; fp8: dx as e4m3."""
    _validate("gelu_backward", grad, "none", fp8, "grad")
    if derivative.dtype != torch.uint8 or derivative.shape != grad.shape or derivative.device != grad.device:
        want, got = (f"{list(t.shape)} on {t.device}" for t in (grad, derivative))
        raise ValueError(f"gelu_backward: derivative must be uint8 {want} like grad, got {derivative.dtype} {got}")
    dx, scale = call(_gelu_backward_op, _gelu_backward, grad.detach(), derivative, fp8)
    return dx, scale if fp8 else None
