"""`lora_linear` on a frozen weight in fp8, row-wise scaled; the adapter stays in 16 bit.

    Y = (Xq Wq^T) * x_scale_m * w_scale_n + b + scale * S B^T      S = drop(x) A^T from the x that was given

    Wq [N, K] e4m3 and w_scale [N, 1] fp32, given; Xq [M, K] e4m3 and x_scale [M, 1], made at each call (`quantize`).

The quantization of x is passed straight through in backward: dX = G (Wq * w_scale) + dS A, with Wq widened to the
dtype of x; or, given Wq^T with scales of its own rows, in fp8 like the forward, with G quantized too. The adapter's
gradients never see fp8. Saved for backward: x and S, as in op.py.
Merging has no place here: rounding W + scale B A to e4m3 would lose the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autocast import autocast_dtype
from .._dispatch import NAMESPACE, requested
from .._transforms import is_transformed
from ..quantize import E4M3, dequantize, quantize, quantize_reference
from . import triton
from .args import STRATEGIES, LoraArgs, flat, pairs, seed_tensor, validate
from .eager import add_input_gradient, drop
from .op import INPUT, gradients, lora_linear_reference
from .strategy import run, shape_class


def lora_linear_fp8_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    dropout: float = 0.0,
    seed: int | Tensor | None = 0,
    rows: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Compute the specification in fp32 or wider; the quantization of x counts as the identity in backward."""
    wide = torch.promote_types(x.dtype, torch.float32)
    w = weight.to(wide) * weight_scale.to(wide)
    x_q, x_scale = quantize_reference(x.detach())
    rounding = x_q.to(wide) * x_scale.to(wide) - x.detach().to(wide)
    y = lora_linear_reference(x.to(wide), w, bias, lora_a, lora_b, scale, dropout=dropout, seed=seed, rows=rows)
    return (y + rounding @ w.mT).to(x.dtype)


def scaled_product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute quantize(x) (weight * weight_scale)^T + bias in the dtype of x, by the library's fp8 GEMM if it can."""
    return scaled_mm(*quantize(x), weight, weight_scale, bias, x.dtype)


def scaled_mm(
    x_q: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Compute (x_q * x_scale) (weight * weight_scale)^T + bias in `dtype`.

    x_q, weight: [M, K] and [N, K], e4m3; their row scales [M, 1] and [N, 1], fp32.
    """
    if _has_scaled_mm(x_q, weight, dtype):
        return torch._scaled_mm(x_q, weight.T, x_scale, weight_scale.T, bias=bias, out_dtype=dtype, use_fast_accum=True)
    y = (x_q.float() @ weight.float().T) * x_scale * weight_scale.T
    return (y if bias is None else y + bias).to(dtype)


def _has_scaled_mm(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    return dtype == torch.bfloat16 and weight.is_contiguous() and all(size % 16 == 0 for size in weight.shape)


def _forward_split(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, lora: LoraArgs
) -> tuple[Tensor, Tensor]:
    y = scaled_product(x, weight, weight_scale, bias)
    s = drop(x, lora.dropout, lora.seed) @ lora.a.T
    for span, ranks, block in lora.adapters(weight.shape[0]):
        y[:, span].addmm_(s[:, ranks], block.T, alpha=lora.scale)
    return y, s


def _forward_triton(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, lora: LoraArgs
) -> tuple[Tensor, Tensor]:
    x_q, x_scale = quantize(x)
    s = triton.project(x, lora)
    return triton.forward_scaled(x_q, weight, (x_scale, weight_scale), bias, lora, s, x.dtype), s


def _forward_reference(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, lora: LoraArgs
) -> tuple[Tensor, Tensor]:
    y = lora_linear_fp8_reference(
        x, weight, weight_scale, bias, lora.a, lora.b, lora.scale,
        dropout=lora.dropout, seed=lora.seed, rows=pairs(lora.rows),
    )  # fmt: skip
    return y, drop(x, lora.dropout, lora.seed) @ lora.a.T


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "split": _forward_split,
    "triton": _forward_triton,
    "reference": _forward_reference,
}


@torch.library.custom_op(f"{NAMESPACE}::lora_linear_fp8", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_t: Tensor | None, weight_t_scale: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float, seed: Tensor | None,
    rows: Sequence[int], save_s: bool, strategy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (y [M, N], S [M, R]); S is empty unless `save_s`."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0]), x.new_empty(0, lora_a.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        lora = LoraArgs(lora_a, lora_b, scale, dropout, seed, rows).to(x.dtype)
        shape = shape_class(x.shape[0], weight.shape[0], weight.shape[1], lora, x.dtype)
        y, s = run("lora_linear_fp8", _FORWARD, (x, weight, weight_scale, bias, lora), lora, strategy, shape)
    return y, s if save_s else x.new_empty(0, lora_a.shape[0])


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_t: Tensor | None, weight_t_scale: Tensor | None,
    bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float, seed: Tensor | None,
    rows: Sequence[int], save_s: bool, strategy: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    M = x.shape[0]
    return x.new_empty(M, weight.shape[0]), x.new_empty(M if save_s else 0, lora_a.shape[0])


@torch.library.custom_op(f"{NAMESPACE}::lora_linear_fp8_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor | None, weight: Tensor, weight_scale: Tensor, is_transposed: bool, lora_a: Tensor,
    lora_b: Tensor, s: Tensor, scale: float, dropout: float, seed: Tensor | None, rows: Sequence[int],
    strategy: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dX, dA, dB); those not in `needs` (x, lora_a, lora_b) are empty."""

    def input_gradient(ds: Tensor, lora: LoraArgs, shape: str) -> Tensor:
        if is_transposed:
            return add_input_gradient(scaled_product(grad, weight, weight_scale), ds, lora)
        widened = dequantize(weight, weight_scale, grad.dtype)
        return run("lora_linear_input", INPUT, (grad, widened, ds, lora), lora, strategy, shape)

    lora = LoraArgs(lora_a, lora_b, scale, dropout, seed, rows)
    K = weight.shape[0] if is_transposed else weight.shape[1]
    return gradients(grad, x, s, lora, K, strategy, needs, input_gradient)


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor | None, weight: Tensor, weight_scale: Tensor, is_transposed: bool, lora_a: Tensor,
    lora_b: Tensor, s: Tensor, scale: float, dropout: float, seed: Tensor | None, rows: Sequence[int],
    strategy: str, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_x, need_a, need_b = needs
    K = weight.shape[0] if is_transposed else weight.shape[1]
    return (
        grad.new_empty((grad.shape[0], K) if need_x else 0),
        lora_a.new_empty(lora_a.shape if need_a else 0),
        lora_b.new_empty(lora_b.shape if need_b else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, weight_scale, weight_t, weight_t_scale, _, a, b, ctx.scale, ctx.dropout, seed, ctx.rows, _, strategy = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.is_transposed = weight_t is not None
    if ctx.is_transposed:
        weight, weight_scale = weight_t, weight_t_scale
    x = x if ctx.needs_input_grad[6] else None
    ctx.save_for_backward(x, weight, weight_scale, a, b, output[1], seed)
    request = requested()
    ctx.strategy = strategy or (request if request in STRATEGIES else "")


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 14
    x, weight, weight_scale, a, b, s, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 6, 7)]
    d = _backward_op(
        grad, x, weight, weight_scale, ctx.is_transposed, a, b, s, ctx.scale, ctx.dropout, seed, ctx.rows,
        ctx.strategy, needs,
    )  # fmt: skip
    dx, da, db = (gradient if need else None for gradient, need in zip(d, needs, strict=True))
    return dx, None, None, None, None, None, da, db, None, None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _unsupported_reason(
    weight: Tensor,
    weight_scale: Tensor,
    transposed: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    strategy: str | None,
) -> str | None:
    N, K = weight.shape
    checks = [("weight_scale", weight_scale, (N, 1), torch.float32)]
    if transposed is not None:
        checks += [
            ("transposed[0]", transposed[0], (K, N), E4M3),
            ("transposed[1]", transposed[1], (K, 1), torch.float32),
        ]
    for name, tensor, shape, dtype in checks:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != weight.device:
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            return f"{name} must be {list(shape)} {dtype} on {weight.device}, got {got}"
    if bias is not None and bias.requires_grad:
        return "bias must be frozen, got one that requires a gradient; call requires_grad_(False) on it"
    if strategy in ("wide_k", "merged", "fastest"):
        return f"strategy {strategy!r} has no fp8 form; take split, triton or reference"
    return None


def _refuse_float64(x: Tensor) -> None:
    if x.dtype == torch.float64:
        raise ValueError("lora_linear_fp8: x must be fp16, bf16 or fp32, got torch.float64")


def lora_linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    *,
    transposed: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    rows: Sequence[tuple[int, int]] | None = None,
    strategy: str | None = None,
) -> Tensor:
    """Compute `lora_linear` for weight, weight_scale = quantize(wide weight): e4m3 [N, K] and fp32 [N, 1].

    x: fp16, bf16 or fp32. The bias is frozen too.
    transposed: `quantize` of the wide weight's transpose, ([K, N], [K, 1]): then the input's gradient is an fp8
        product as well; without it the weight is widened and the gradient exact for the quantized weight.
    strategy: None (split or triton, measured), or "split", "triton", "reference".
    """
    if x.is_floating_point() and x.dtype != torch.float64 and (dtype := autocast_dtype(x.device)):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    _refuse_float64(x)
    validate("lora_linear_fp8", x, weight, bias, lora_a, lora_b, scale, dropout, flat(rows), strategy, E4M3)
    if reason := _unsupported_reason(weight, weight_scale, transposed, bias, strategy):
        raise ValueError(f"lora_linear_fp8: {reason}")
    seed_ = seed_tensor(seed, x.device) if dropout else None
    if is_transformed("lora_linear_fp8", x, lora_a, lora_b):
        lora = LoraArgs(lora_a, lora_b, scale, dropout, seed_, flat(rows))
        with torch.autocast(x.device.type, enabled=False):
            return _forward_reference(x, weight, weight_scale, bias, lora)[0]
    save_s = torch.is_grad_enabled() and lora_b.requires_grad
    x_MK, scale, dropout = x.reshape(-1, x.shape[-1]), float(scale), float(dropout)
    y, _ = _op(
        x_MK, weight, weight_scale, *(transposed or (None, None)), bias, lora_a, lora_b, scale, dropout, seed_,
        flat(rows), save_s, strategy or "",
    )  # fmt: skip
    return y.view(*x.shape[:-1], weight.shape[0])
