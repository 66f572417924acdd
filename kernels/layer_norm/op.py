"""Layer norm, bare or with a trained scale and shift, and in the same pass the other products of a frozen block.

    h     = x + residual                          the new residual stream, rounded to the dtype of x
    x_hat = (h - mean) * rstd                     mean and rstd = 1 / sqrt(var + eps) over the row, in fp32
    y     = x_hat        or  x_hat * weight + bias
    s     = y A^T                                 of a LoRA on the next layer (bare form only)
    q     = y in e4m3 with row scales             for an fp8 product (quantize.py)

M tokens, K width, R rank. Bare is the form of a frozen model whose scale and shift are folded into the next weight.

Backward, with g = dy (* weight) + ds A:
    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dh          for x and for residual
    dweight = sum dy * x_hat    dbias = sum dy    dA = ds^T y

Saved for backward: bare: y = x_hat and rstd (2 K + 4 bytes a token in 16 bit). With a weight: h, mean and rstd.
Bytes moved an entry in 16 bit: forward 2 in, 2 out (+ 2 + 2 with a residual, + 1 for q); backward 4 in, 2 out
(+ 2 with dh). Eager makes separate passes for the sum, the product with A^T and the quantization.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import without_autocast
from .._define import call, define, filled
from .._dispatch import NAMESPACE, choose
from .._transforms import is_transformed, refuse_second_derivative
from ..quantize import native_fp8, quantize_reference, row_unsupported_reason
from . import triton
from .args import rows_of, unsupported_reason
from .triton import Gradients, Outputs, empty_codes, outputs, wide_dtype


def layer_norm_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the specification, (y, h), with statistics in fp32 or wider; differentiable by autograd."""
    h, wide = x if residual is None else x + residual, wide_dtype(x)
    scale, shift = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(h.to(wide), h.shape[-1:], scale, shift, eps).to(x.dtype), h


def layer_norm_backward_reference(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor | None = None, grad_h: Tensor | None = None
) -> Tensor:
    """Compute dx of the formula above in fp32 or wider, rounded to the dtype of `grad`."""
    wide = wide_dtype(grad)
    g, x_hat = grad.to(wide) if weight is None else grad.to(wide) * weight.to(wide), x_hat.to(wide)
    dx = g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True)
    dx = rstd.to(wide)[..., None] * dx
    return (dx if grad_h is None else dx + grad_h.to(wide)).to(grad.dtype)


def _takes_triton(op: str, x: Tensor) -> bool:
    reason = "no float64 form" if x.dtype == torch.float64 else row_unsupported_reason(x.shape[-1], x)
    return x.numel() > 0 and choose(op, x.device, {"triton": reason, "reference": None}) == "triton"


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None,
    eps: float, save_y: bool, fp8: bool,
) -> Outputs:  # fmt: skip
    if _takes_triton("layer_norm", x):
        return triton.forward(x, residual, weight, bias, lora_a, eps, save_y, fp8, native_fp8(x.device))
    y, h, mean, rstd, s, q, scale = outputs(x, residual, lora_a, save_y, fp8)
    with without_autocast(x.device):
        value, total = layer_norm_reference(x, weight, bias, eps, residual)
        wide = total.to(wide_dtype(x))
        mean.copy_(wide.mean(-1))
        rstd.copy_((wide.var(-1, correction=0) + eps).rsqrt())
        if y is not None:
            y.copy_(value)
        if h is not None:
            h.copy_(total)
        if s is not None and lora_a is not None:
            s.copy_(value @ lora_a.T)
        if fp8:
            exact = layer_norm_reference(total.float(), weight, bias, eps)[0]
            codes, scale = quantize_reference(exact)
            q = codes.view(torch.uint8)
    return y, h, mean, rstd, s, q, scale


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None,
    eps: float, save_y: bool, fp8: bool,
) -> Outputs:  # fmt: skip
    return outputs(x, residual, lora_a, save_y, fp8)


_SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? lora_a, float eps, bool save_y, bool fp8) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_op = torch.library.custom_op(f"{NAMESPACE}::layer_norm", filled(_forward), mutates_args=(), schema=_SCHEMA)
_op.register_fake(filled(_fake_forward))
_forward_op = define(f"layer_norm_forward{_SCHEMA}", _forward, _fake_forward)


def _gradients(
    grad: Tensor, saved: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, grad_h: Tensor | None,
    sums: bool, fp8: bool,
) -> Gradients:  # fmt: skip
    """Return (dx, dweight, dbias, q, scale): the sums, in fp32, are None unless `sums`; q and scale unless `fp8`."""
    if _takes_triton("layer_norm_backward", grad):
        device = grad.device
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return triton.backward(grad, saved, mean, rstd, weight, grad_h, sums, fp8, native_fp8(device), processors)
    dx, dweight, dbias, q, scale = _fake_gradients(grad, saved, mean, rstd, weight, grad_h, sums, fp8)
    x_hat = saved if weight is None else (saved.to(wide_dtype(grad)) - mean[..., None]) * rstd[..., None]
    dx.copy_(layer_norm_backward_reference(grad, x_hat, rstd, weight, grad_h))
    if dweight is not None and dbias is not None:
        rows = list(range(grad.dim() - 1))
        torch.sum(grad.to(wide_dtype(grad)) * x_hat, rows, out=dweight)
        torch.sum(grad.to(wide_dtype(grad)), rows, out=dbias)
    if fp8:
        exact = layer_norm_backward_reference(grad.float(), x_hat, rstd, weight, grad_h)
        codes, scale = quantize_reference(exact.contiguous())
        q = codes.view(torch.uint8)
    return dx, dweight, dbias, q, scale


def _fake_gradients(
    grad: Tensor, saved: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, grad_h: Tensor | None,
    sums: bool, fp8: bool,
) -> Gradients:  # fmt: skip
    """Return empty outputs."""
    of_weight, of_bias = (grad.new_empty(grad.shape[-1], dtype=wide_dtype(grad)) if sums else None for _ in range(2))
    return grad.new_empty(grad.shape), of_weight, of_bias, *(empty_codes(grad) if fp8 else (None, None))


_backward_op = define(
    "layer_norm_backward(Tensor grad, Tensor saved, Tensor mean, Tensor rstd, Tensor? weight, Tensor? grad_h, "
    "bool sums, bool fp8) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gradients, _fake_gradients,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, bias, lora_a = inputs[:5]
    y, h, mean, rstd = output[:4]
    ctx.set_materialize_grads(False)
    saved = y if weight is None else x if residual is None else h
    ctx.save_for_backward(saved, mean, rstd, weight, lora_a)
    ctx.has_residual = residual is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(
    ctx: Any,
    grad: Tensor | None,
    grad_h: Tensor | None,
    _mean: Tensor | None,
    _rstd: Tensor | None,
    grad_s: Tensor | None,
    *_: Any,
) -> tuple[Any, ...]:
    refuse_second_derivative("layer_norm")
    saved, mean, rstd, weight, lora_a = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, need_a = ctx.needs_input_grad[:5]
    dx = dweight = dbias = da = None
    # a caller that uses all outputs alike may send gradients of those that were not requested, too
    grad_h = grad_h if ctx.has_residual else None
    if grad_s is not None and lora_a is not None:
        through_s = grad_s.to(lora_a.dtype) @ lora_a
        grad = through_s.to(saved.dtype) if grad is None else grad + through_s
        da = rows_of(grad_s, len(lora_a)).T @ rows_of(saved, lora_a.shape[1]) if need_a else None
    if grad is None:
        dx = grad_h
    elif any(ctx.needs_input_grad[:4]):
        sums = need_weight or need_bias
        dx, dweight, dbias, _, _ = _backward_op(grad, saved, mean, rstd, weight, grad_h, sums, False)
        dweight = dweight.to(weight.dtype) if need_weight else None
        dbias = dbias.to(ctx.bias_dtype) if need_bias else None
    return dx if need_x else None, dx if need_residual else None, dweight, dbias, da, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


def _normalize(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    eps: float,
    save_y: bool = True,
    fp8: bool = False,
) -> Outputs:
    """Validate the arguments of `op` and run it; not requested: None, or of size 0 where autograd records it."""
    if reason := unsupported_reason(x, residual, weight, bias, lora_a, eps, fp8):
        raise ValueError(f"{op}: {reason}")
    needs_gradient = _needs_gradient(x, residual, weight, bias, lora_a)  # which is computed from y
    args = x, residual, weight, bias, lora_a, float(eps), save_y or needs_gradient, fp8
    results = _op(*args) if needs_gradient else call(_forward_op, _forward, *args)
    y, h, mean, rstd, s, q, scale = results
    return y, x if residual is None else h, mean, rstd, s, q, scale


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _checked(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, float, Tensor | None]:
    """Validate the arguments of `op` and return them as `layer_norm_reference` takes them."""
    if reason := unsupported_reason(x, residual, weight, bias, None, eps, False):
        raise ValueError(f"{op}: {reason}")
    return x, weight, bias, float(eps), residual


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Compute (x - mean) / sqrt(var + eps) [* weight [+ bias]] over the last dimension of x [..., K].

    x: fp16, bf16, fp32 or fp64; weight, bias: [K], in the dtype of x or in fp32 (then so are their gradients).
    Returns the dtype of x, with or without autocast; statistics are in fp32. Raises ValueError for unfit arguments.
    """
    if is_transformed("layer_norm", x, weight, bias):
        return layer_norm_reference(*_checked("layer_norm", x, None, weight, bias, eps))[0]
    y = _normalize("layer_norm", x, None, weight, bias, None, eps)[0]
    assert y is not None
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Compute (layer_norm(h, weight, bias, eps), h) with h = x + residual in one pass. Arguments as `layer_norm`."""
    if is_transformed("add_layer_norm", x, residual, weight, bias):
        return layer_norm_reference(*_checked("add_layer_norm", x, residual, weight, bias, eps))
    y, h, *_ = _normalize("add_layer_norm", x, residual, weight, bias, None, eps)
    assert y is not None and h is not None
    return y, h
