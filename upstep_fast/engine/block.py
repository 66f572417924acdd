"""One pre-norm ViT block with frozen weights: forward, hand-written backward, and what is kept between them.

    h1, r1 = norm(x)                 bare normalisation: scale and shift are folded into qkv (fold.py)
    y  = h1 (Wqkv + s B A)^T + c     the adapter merged into the weight: rounded once a step
    o  = softmax(q k^T / sqrt(d)) v
    x' = x + o Wproj^T + c
    h2 = norm(x'); u = h2 W1^T + c; g = gelu(u)
    x" = x' + g W2^T + c

Backward, with dx" given (frozen weights need no gradient, so each projection costs one product, not two):

    du = (dx" W2) gelu'(u)           dx' = dx" + norm'(du W1)
    dy = attention'(dx' Wproj)       dx  = dx' + norm'(dy (Wqkv + s B A))
    S = h1 A^T + A beta              dB = s dy^T S;  dS = s dy B;  dA = dS^T h1;  d(A beta) = sum dS

Shapes: M tokens in all, D width, T adapted parts of rank r. Kept for backward at level "fast": x, x', u, y and o, that
is 2 D + 4 D + 3 D + D values a token, and the norms' statistics; at "lean" x alone, and the rest is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.attention import attention_backward, attention_forward
from .fold import FoldedBlock, FoldedLinear

Memory = Literal["fast", "lean"]


@dataclass(frozen=True)
class Merged:
    """A projection ready to multiply: the frozen weight with the adapter added, in the compute type."""

    weight: Tensor  # [N, K]
    bias: Tensor  # [N]


def run_block(x: Tensor, block: FoldedBlock, memory: Memory = "fast") -> Tensor:
    """x: [B, N, D] in the compute type -> the same; differentiable in x and in the adapters on the block."""
    factors = [f for linear in block.linears for f in (linear.adapter_factors() or ())]
    if torch.is_grad_enabled() and (x.requires_grad or any(f.requires_grad for f in factors)):
        return _Block.apply(x, block, memory, *factors)
    return _forward(x, block, _merge_all(block, factors), None)


class _Block(torch.autograd.Function):
    """The hand-written pair; adapter factors come as tensors so that autograd carries on behind them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: FoldedBlock, memory: Memory, *factors: Tensor) -> Tensor:
        merged = _merge_all(block, factors)
        kept: dict[str, Tensor] | None = {} if memory == "fast" else None
        out = _forward(x, block, merged, kept)
        ctx.block, ctx.memory, ctx.names = block, memory, list(kept or {})
        ctx.save_for_backward(x, *(kept or {}).values(), *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        kept = dict(zip(ctx.names, rest, strict=False))
        factors = rest[len(kept) :]
        merged = _merge_all(ctx.block, factors)
        if ctx.memory == "lean":
            kept = {}
            _forward(x, ctx.block, merged, kept)
        needs = list(ctx.needs_input_grad)
        dx, d_factors = _backward(grads[0], x, ctx.block, merged, kept, factors, needs[0])
        return dx, None, None, *d_factors


def _forward(x: Tensor, block: FoldedBlock, merged: Sequence[Merged], kept: dict[str, Tensor] | None) -> Tensor:
    qkv, proj, fc1, fc2 = merged
    h1 = _norm(x, block.eps[0])
    y = F.linear(h1, qkv.weight, qkv.bias)
    del h1
    o, lse = attention_forward(_heads(y, block.heads))
    o = o.flatten(2)
    middle = F.linear(o, proj.weight, proj.bias).add_(x)
    h2 = _norm(middle, block.eps[1])
    u = F.linear(h2, fc1.weight, fc1.bias)
    g = gelu(u, block.activation)
    if kept is not None:
        kept |= {"y": y, "o": o, "lse": lse, "middle": middle, "u": u}
    return F.linear(g, fc2.weight, fc2.bias).add_(middle)


def _backward(
    grad: Tensor,
    x: Tensor,
    block: FoldedBlock,
    merged: Sequence[Merged],
    kept: dict[str, Tensor],
    factors: Sequence[Tensor],
    needs_dx: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    qkv, proj, fc1, fc2 = merged
    y, o, lse, middle, u = (kept[name] for name in ("y", "o", "lse", "middle", "u"))
    of = dict(zip(_adapted(block), _threes(factors), strict=True))
    d_of: dict[str, tuple[Tensor, ...]] = {}

    if "fc2" in of:
        d_of["fc2"] = adapter_gradients(grad, gelu(u, block.activation), block.fc2, of["fc2"])
    du = gelu_backward(grad @ fc2.weight, u, block.activation)
    if "fc1" in of:
        d_of["fc1"] = adapter_gradients(du, _norm(middle, block.eps[1]), block.fc1, of["fc1"])
    d_middle = norm_backward(du @ fc1.weight, middle, block.eps[1]).add_(grad)
    del du
    if "proj" in of:
        d_of["proj"] = adapter_gradients(d_middle, o, block.proj, of["proj"])
    d_o = (d_middle @ proj.weight).view(*o.shape[:2], block.heads, -1)
    dy = attention_backward(d_o, _heads(y, block.heads), o.view_as(d_o), lse).view_as(y)
    if "qkv" in of:
        d_of["qkv"] = adapter_gradients(dy, _norm(x, block.eps[0]), block.qkv, of["qkv"])
    dx = norm_backward(dy @ qkv.weight, x, block.eps[0]).add_(d_middle) if needs_dx else None
    return dx, [d for name in _adapted(block) for d in d_of[name]]


def merge(linear: FoldedLinear, factors: Sequence[Tensor] | None) -> Merged:
    """W + s B A and b + s B (A beta), added in fp32 and rounded once. factors: (A, A beta, B) or None."""
    if factors is None or linear.adapter is None:
        return Merged(linear.weight, linear.bias)
    a, shift, b = (f.detach() for f in factors)
    scale, parts = linear.adapter.scale, linear.adapter.parts
    weight, bias = linear.weight.float(), linear.bias.float()
    if weight is linear.weight:  # already fp32: the frozen tensors themselves must stay
        weight, bias = weight.clone(), bias.clone()
    rows = b.shape[1]
    for t, part in enumerate(parts):
        weight[part * rows : (part + 1) * rows].addmm_(b[t], a[t], alpha=scale)
        bias[part * rows : (part + 1) * rows].addmv_(b[t], shift[t], alpha=scale)
    return Merged(weight.to(linear.weight.dtype), bias.to(linear.bias.dtype))


def adapter_gradients(
    dy: Tensor, h: Tensor, linear: FoldedLinear, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (A [T, r, K], A beta [T, r], B [T, n, r]) in fp32, from dy [..., N] and the input h [..., K]."""
    assert linear.adapter is not None
    a, shift, b = (f.detach() for f in factors)
    scale, parts = linear.adapter.scale, linear.adapter.parts
    dy, h = dy.flatten(0, -2), h.flatten(0, -2)
    low = F.linear(h, a.flatten(0, 1).to(h.dtype), shift.flatten().to(h.dtype))  # [M, T r]
    rows, r = b.shape[1:]
    d_low, d_b = torch.empty_like(low), torch.empty_like(b)
    for t, part in enumerate(parts):
        dy_part, own = dy[:, part * rows : (part + 1) * rows], slice(t * r, (t + 1) * r)
        d_b[t] = dy_part.T @ low[:, own]
        d_low[:, own] = dy_part @ b[t].to(dy.dtype)
    d_a = (d_low.T @ h).float().view_as(a)
    d_shift = d_low.float().sum(0).view_as(shift)
    return scale * d_a, scale * d_shift, scale * d_b


def gelu(u: Tensor, activation: str) -> Tensor:
    """erf: x Phi(x). tanh: its tanh approximation. quick: x sigmoid(1.702 x)."""
    if activation == "quick":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="tanh" if activation == "tanh" else "none")


def gelu_backward(d_g: Tensor, u: Tensor, activation: str) -> Tensor:
    """d_g gelu'(u)."""
    if activation == "quick":
        s = torch.sigmoid(1.702 * u)
        return d_g * (s + 1.702 * u * s * (1 - s))
    return torch.ops.aten.gelu_backward(d_g, u, approximate="tanh" if activation == "tanh" else "none")


def norm_backward(d_h: Tensor, x: Tensor, eps: float) -> Tensor:
    """Gradient of the bare normalisation: rstd (d_h - mean d_h - h mean(d_h h))."""
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    return torch.ops.aten.native_layer_norm_backward(
        d_h, x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def _norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], None, None, eps)


def _heads(y: Tensor, heads: int) -> Tensor:
    """[B, N, 3 D] -> [B, N, 3, H, d]."""
    return y.view(*y.shape[:2], 3, heads, -1)


def _adapted(block: FoldedBlock) -> list[str]:
    return [name for name in ("qkv", "proj", "fc1", "fc2") if getattr(block, name).adapter is not None]


def _threes(factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [factors[i : i + 3] for i in range(0, len(factors), 3)]


def _merge_all(block: FoldedBlock, factors: Sequence[Tensor]) -> list[Merged]:
    threes = iter(_threes(factors))
    return [merge(linear, next(threes) if linear.adapter is not None else None) for linear in block.linears]
