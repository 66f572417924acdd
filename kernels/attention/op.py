"""Softmax attention over short sequences, from packed qkv, with the gradient written packed.

    S = scale * q k^T        lse_t = log sum_s exp(S_ts)        P = exp(S - lse)        o = P v
Backward (G = do):
    delta_t = sum_d o G      dS = P * (G v^T - delta)
    dq = scale * dS k        dk = scale * dS^T q        dv = P^T G

B images, T tokens, H heads, d head width (64 to 128 in Vision Transformers). No mask, no dropout.

Forms: `triton` (triton.py), `flash` and `cudnn` (PyTorch's own, on a GPU in 16 bit), `cpp` (cpp.py) and `sdpa`
(PyTorch's) on a CPU, `reference`. The fastest by measurement runs, chosen for forward and backward separately: all give
o and lse. Every form gives the same bits each time: flash's backward runs in its deterministic mode, and cuDNN's, which
has none, is left out.

Saved for backward: qkv, o and lse (4 bytes a token and head).
Bytes moved by `triton`: qkv in, o out; backward qkv and G twice (once by `triton_heads`: triton_head.py), o in, dqkv
out. PyTorch's backward forms write dq, dk and dv separately, and stacking them moves dqkv twice more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._autocast import autocast_dtype, without_autocast
from .._autotune import autotune, power_class
from .._define import call, define
from .._dispatch import NAMESPACE, record, requested, triton_unsupported_reason
from .._fastest_on_cpu import fastest_on_cpu
from .._transforms import is_transformed, refuse_second_derivative
from . import cpp
from .triton import MAX_WIDTH, backward_by_heads, fits_heads, outputs
from .triton import backward as _backward_triton
from .triton import forward as _forward_triton

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Out = TypeVar("Out")
MAX_STORED = 512  # tokens up to which a CPU's bf16 backward holds whole P; at 1370 it is no faster


def attention_reference(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute the specification in fp32 or wider: (out [B, T, H, d], lse [B, H, T]); differentiable by autograd."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(2, 0, 3, 1, 4)
    scores = scale * (q @ k.mT)
    return (scores.softmax(-1) @ v).transpose(1, 2).to(qkv.dtype), scores.logsumexp(-1)


def attention_backward_reference(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """Compute dqkv by the formula above, from the o and lse of the forward."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)
    g, o = (t.to(wide).transpose(1, 2) for t in (grad, out))
    p = (scale * (q @ k.mT) - lse[..., None].to(wide)).exp()
    ds = p * (g @ v.mT - (o * g).sum(-1, keepdim=True))
    return torch.stack([scale * (ds @ k), scale * (ds.mT @ q), p.mT @ g]).permute(1, 3, 0, 2, 4).to(qkv.dtype)


def _forward_sdpa(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # PyTorch's own gives 0 to a row of NaN; a sum finds one in a tenth of the time that isfinite takes. In bf16 it adds
    # in fp32 by itself, and a cast first takes five times as long; in fp16 it would overflow
    if not qkv.sum(dtype=torch.float32 if qkv.dtype == torch.float16 else None).isfinite():
        return attention_reference(qkv, scale)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _backward_products(grad: Tensor, qkv: Tensor, lse: Tensor, scale: float) -> Tensor:
    # S in fp32, for the exponential; P and dS rounded to bf16, as fused kernels round them. 28 ms where the library's
    # backward in fp32 takes 39 and in bf16 45, at [8, 197, 12, 64] (one thread of an Intel Xeon with AMX, torch 2.15)
    B, T, _, H, D = qkv.shape
    q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)
    g = grad.transpose(1, 2).contiguous().flatten(0, 1)
    p = torch.baddbmm(lse.view(B * H, T, 1), q.float(), k.float().mT, beta=-1, alpha=scale).exp_().to(qkv.dtype)
    ds = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, qkv.dtype)
    packed = torch.empty_like(qkv)
    for i, (a, b) in enumerate(((ds, k), (ds.mT, q), (p.mT, g))):
        product = torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale if i < 2 else 1)
        packed[:, :, i] = product.view(B, H, T, D).transpose(1, 2)
    return packed


def _backward_sdpa(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    if qkv.dtype == torch.bfloat16 and qkv.shape[1] <= MAX_STORED:
        return _backward_products(grad, qkv, lse, scale)
    # the library's backward in fp32: in bf16 it takes 44 ms instead of 14 at [128, 3, 65, 64] (2 cores of an AMD EPYC
    # with AVX512-BF16, torch 2.15)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(wide).permute(2, 0, 3, 1, 4)
    grad, out = grad.to(wide).transpose(1, 2), out.to(wide).transpose(1, 2)
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, scale=scale
    )
    packed = torch.empty_like(qkv)
    for i, gradient in enumerate(gradients):  # each to its place and type at once: stacked first, a fifth slower
        packed[:, :, i] = gradient.transpose(1, 2)
    return packed


def _forward_flash(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out.transpose(1, 2), lse


def _backward_flash(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    (q, k, v), T = qkv.permute(2, 0, 3, 1, 4), qkv.shape[1]
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    # without dropout its random state is not read
    state = torch.empty(2, dtype=torch.int64, device=qkv.device)
    with _deterministic():
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, T, T, 0.0, False, state, state, scale=scale
        )
    return _packed(gradients)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    # else flash adds dq atomically, and a resumed run promises the bits of an unbroken one
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def _forward_cudnn(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out.transpose(1, 2), lse.view(lse.shape[:3])


def _backward_cudnn(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    (q, k, v), T = qkv.permute(2, 0, 3, 1, 4), qkv.shape[1]
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    state = torch.empty((), dtype=torch.int64, device=qkv.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse[..., None], state, state, None, None, None, T, T, 0.0, False, scale=scale
    )
    return _packed(gradients)


def _packed(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Stack dq, dk, dv [B, H, T, d] to [B, T, 3, H, d]."""
    return torch.stack([g.transpose(1, 2) for g in gradients], 2)


_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "flash": _forward_flash,
    "cudnn": _forward_cudnn,
    "triton": _forward_triton,
    "cpp": cpp.forward,
    "sdpa": _forward_sdpa,
    "reference": attention_reference,
}
_BACKWARD: dict[str, Callable[..., Tensor]] = {
    "flash": _backward_flash,
    "cudnn": _backward_cudnn,
    "triton": _backward_triton,
    "cpp": cpp.backward,
    "triton_heads": backward_by_heads,
    "sdpa": _backward_sdpa,
    "reference": attention_backward_reference,
}


def _run(op: str, forms: Mapping[str, Callable[..., Out]], qkv: Tensor, args: Sequence[Tensor | float]) -> Out:
    """Run and record the form of `op` that is requested, the CPU's, or the one measured as fastest; args: of a form."""
    B, T, _, H, D = qkv.shape
    no_triton, no_cpp, request = _unsupported_reason(qkv), cpp.unsupported_reason(qkv), requested()
    for name, reason in (("triton", no_triton), ("cpp", no_cpp)):
        if request == name and reason:
            raise RuntimeError(f"{op}: implementation {name!r} was requested but cannot run: {reason}")
    if request is not None and request in forms:
        return forms[record(op, qkv.device, request, "requested")](*args)
    kind = str(qkv.dtype).removeprefix("torch.")
    problem = f"{op} {kind} BH{power_class(B * H)} T{T} D{D}"
    if qkv.device.type == "cpu" and not no_cpp:
        candidates = {name: partial(forms[name], *args) for name in ("cpp", "sdpa")}
        return forms[fastest_on_cpu(f"cpu {problem}", candidates)](*args)
    if qkv.device.type != "cuda":
        return forms[record(op, qkv.device, "sdpa", f"PyTorch's own; not cpp: {no_cpp}")](*args)
    is_half = qkv.dtype in (torch.float16, torch.bfloat16)
    # cuDNN's backward adds dq atomically and has no deterministic form
    libraries = ["flash"] if op == "attention_backward" else ["flash", "cudnn"]
    names = libraries if is_half and D % 8 == 0 and D <= MAX_WIDTH else []
    names = names or (["reference"] if no_triton else [])
    ours = ["triton", "triton_heads"] if op == "attention_backward" and fits_heads(qkv) else ["triton"]
    names = names if no_triton else [*names, *ours]
    name, reason = autotune(problem, qkv.device, {name: partial(forms[name], *args) for name in names})
    return forms[record(problem, qkv.device, name, reason)](*args)


def _unsupported_reason(qkv: Tensor) -> str | None:
    """Return why the Triton form cannot take `qkv`, or None."""
    if qkv.shape[4] > MAX_WIDTH:
        return f"head width {qkv.shape[4]} exceeds {MAX_WIDTH}"
    return triton_unsupported_reason(qkv) or ("no float64 form" if qkv.dtype == torch.float64 else None)


def _forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out [B, T, H, d], lse [B, H, T])."""
    if not qkv.numel():
        out, lse = outputs(qkv)
        return out.zero_(), lse.zero_()
    qkv = qkv.contiguous()
    with without_autocast(qkv.device):
        out, lse = _run("attention", _FORWARD, qkv, (qkv, scale))
    return out.contiguous(), lse.contiguous()


def _fake_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return outputs(qkv)


def _attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    if not qkv.numel():
        return torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    grad, qkv, out, lse = (t.contiguous() for t in (grad, qkv, out, lse))
    with without_autocast(qkv.device):
        return _run("attention_backward", _BACKWARD, qkv, (grad, qkv, out, lse, scale)).contiguous()


def _fake_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_op = torch.library.custom_op(f"{NAMESPACE}::attention", _forward, mutates_args=())
_op.register_fake(_fake_forward)
_forward_op = define("attention_forward(Tensor qkv, float scale) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_op = define(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, float scale) -> Tensor",
    _attention_backward, _fake_backward,
)  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, grad: Tensor | None, _lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None
    refuse_second_derivative("attention")
    return _backward_op(grad, *ctx.saved_tensors, ctx.scale), None


_op.register_autograd(_backward, setup_context=_setup_context)


def attention(qkv: Tensor, scale: float | None = None) -> Tensor:
    """Compute softmax(scale q k^T) v of every head: packed qkv [B, T, 3, H, d] -> [B, T, H, d].

    qkv: fp16, bf16, fp32 or fp64, any strides (a copy is made unless contiguous). scale: None: 1 / sqrt d.
    The gradient comes packed like qkv. Under autocast qkv is cast as for torch's own attention.
    Raises ValueError for arguments that do not fit, RuntimeError for an implementation that cannot run here.
    """
    if qkv.is_floating_point() and qkv.dtype != torch.float64 and (dtype := autocast_dtype(qkv.device)):
        qkv = qkv.to(dtype)
    scale = _validated("attention", qkv, scale)
    if is_transformed("attention", qkv):
        return attention_reference(qkv, scale)[0]
    return _op(qkv, scale)[0]


def attention_forward(qkv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return (out, lse [B, H, T] in fp32 or wider), for a backward written by hand; outside autograd and autocast."""
    return call(_forward_op, _forward, qkv.detach(), _validated("attention_forward", qkv, scale))


def attention_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """Return dqkv [B, T, 3, H, d] from the gradient of out and the input and outputs of `attention_forward`."""
    scale = _validated("attention_backward", qkv, scale)
    B, T, _, H, D = qkv.shape
    for name, t, shape in (("grad", grad, (B, T, H, D)), ("out", out, (B, T, H, D)), ("lse", lse, (B, H, T))):
        if t.shape != shape or t.device != qkv.device:
            want, got = f"{list(shape)} on {qkv.device}", f"{list(t.shape)} on {t.device}"
            raise ValueError(f"attention_backward: {name} must be {want} to fit qkv, got {got}")
    return call(_backward_op, _attention_backward, grad.detach(), qkv.detach(), out.detach(), lse.detach(), scale)


def _validated(op: str, qkv: Tensor, scale: float | None) -> float:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.dtype not in _DTYPES:
        got = f"{list(qkv.shape)} in {qkv.dtype}"
        raise ValueError(f"{op}: qkv must be [B, T, 3, H, d] in fp16, bf16, fp32 or fp64, got {got}")
    if scale is None:
        return float(max(qkv.shape[4], 1) ** -0.5)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return float(scale)
