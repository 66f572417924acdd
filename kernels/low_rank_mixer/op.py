"""Mixers of one adaptor of LoSA's side network (arXiv 2402.02887, our reading), with a backward that saves little.

    u = b + a                           gated: s b + (1 - s) a, s = sigmoid(gate)
    x_0 = u;  x_{i+1} = x_i + c_i       c_i = W2 gelu(low_i) + c2, low_i = W1 norm(x_i) + c1, along the i-th axis
    out = a + scale sum c_i             replace: b + scale sum c_i

b: a frozen block's output, a: its refinement so far, both [P, N, D]: P images (or frames), N tokens, D channels. An
axis is channel (n = D, W1 [r, D]) or token (n = N, W1 [s, N], one for all channels); of clips space (that is token) and
time (n = T frames). norm: layer norm over D without scale and shift.

Backward, with g the gradient of out and d_i that of c_i, from the last mixer to the first:
    d_i = scale g + du_{i+1}        du_i = du_{i+1} + norm'(W1^T d_low_i), d_low_i = gelu'(low_i) W2^T d_i; du_k = 0
    da  = g + du_0                      replace: du_0; gated: g + (1 - s) du_0
    d scale = sum g sum c_i             d gate = s (1 - s) sum du_0 (b - a)
    norm'(d) = rstd (d - mean d - x_hat mean(d x_hat)); along channels mean(d x_hat) = d_low (low - c1) / D

Saved for backward: u, 2 D bytes a token in 16 bit (gated: b - a too), and low_i: r values a token along channels,
s D / N along tokens. b gets no gradient.

Bytes moved, in passes over [P, N, D] (thin reads of low and of the factors left out; channel, then token; combine
sum): forward 20 passes in 12 launches, backward 26 in 25. All are the library's thin products and elementwise ops, with
the norms by the kernels of layer_norm on a GPU in 16 bit. A fused Triton form with 6 passes each way was removed before
any GPU timed it. Estimated from its machine code (bench/kernels/static.py, ViT-L/14, 128 views, H200) it was bound by
instructions: 347 us forward, where 20 passes and 12 launches are 340 us, and 1,973 us backward, some three times the
library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dispatch import NAMESPACE, choose
from .._transforms import is_transformed, refuse_second_derivative
from . import eager
from .args import EPS, MixerArgs, fours, validate


def low_rank_mixer_reference(
    b: Tensor,
    a: Tensor,
    axes: Sequence[str],
    factors: Sequence[Tensor],
    combine: str = "sum",
    frames: int = 1,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Compute the specification of `low_rank_mixer` (its arguments) in fp32 or wider; differentiable in everything."""
    (P, N, D), wide = b.shape, torch.promote_types(b.dtype, torch.float32)
    b_, a_ = b.to(wide), a.to(wide)
    u = b_ + a_ if gate is None else a_ + gate.to(wide).sigmoid() * (b_ - a_)
    x = u
    for axis, four in zip(axes, fours(factors), strict=True):
        down, down_bias, up, up_bias = (t.to(wide) for t in four)
        x_hat = F.layer_norm(x, (D,), eps=EPS)
        # the axis goes last
        at = {"channel": (P, N, D), "time": (P // frames, frames, N * D)}.get(axis, (P, N, D))
        x_hat = x_hat.reshape(at) if axis == "channel" else x_hat.reshape(at).mT
        change = F.linear(F.gelu(F.linear(x_hat, down, down_bias)), up, up_bias)
        x = x + (change if axis == "channel" else change.mT).reshape(P, N, D)
    delta = x - u if scale is None else scale.to(wide) * (x - u)
    return ((b_ if combine == "replace" else a_) + delta).to(b.dtype)


def _forward(
    b: Tensor, a: Tensor, axes: str, combine: str, frames: int, gate: Tensor | None, scale: Tensor | None,
    factors: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return (out, u, b - a or empty, each mixer's low); axes: names between spaces."""
    args = MixerArgs(axes.split(), combine, frames, gate, scale, factors)
    with torch.autocast(b.device.type, enabled=False):
        choose("low_rank_mixer", b.device, {"reference": None})
        return eager.forward(b, a, args)


_op = torch.library.custom_op(f"{NAMESPACE}::low_rank_mixer", _forward, mutates_args=())


@_op.register_fake
def _(
    b: Tensor, a: Tensor, axes: str, combine: str, frames: int, gate: Tensor | None, scale: Tensor | None,
    factors: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    P, N, D = b.shape
    shapes = {"channel": lambda r: (P, N, r), "time": lambda r: (P // frames, r, N * D)}
    lows = [
        b.new_empty(shapes.get(axis, lambda r: (P, r, D))(down.shape[0]))
        for axis, down in zip(axes.split(), factors[::4], strict=True)
    ]
    return b.new_empty(P, N, D), b.new_empty(P, N, D), b.new_empty(0 if gate is None else (P, N, D)), lows


def _gradients(
    grad: Tensor, u: Tensor, difference: Tensor, lows: list[Tensor], axes: str, combine: str, frames: int,
    gate: Tensor | None, scale: Tensor | None, factors: list[Tensor], needs_da: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return the gradients of a, gate and scale (empty where there is none) and of the factors."""
    args = MixerArgs(axes.split(), combine, frames, gate, scale, factors)
    with torch.autocast(u.device.type, enabled=False):
        choose("low_rank_mixer_backward", u.device, {"reference": None})
        *narrow, d_factors = eager.backward(grad, u, difference, lows, args, needs_da)
    da, d_gate, d_scale = (u.new_empty(0) if d is None else d for d in narrow)
    return da, d_gate, d_scale, d_factors


_backward_op = torch.library.custom_op(f"{NAMESPACE}::low_rank_mixer_backward", _gradients, mutates_args=())


@_backward_op.register_fake
def _(
    grad: Tensor, u: Tensor, difference: Tensor, lows: list[Tensor], axes: str, combine: str, frames: int,
    gate: Tensor | None, scale: Tensor | None, factors: list[Tensor], needs_da: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    d_gate, d_scale = (u.new_empty(0) if t is None else torch.empty_like(t) for t in (gate, scale))
    return u.new_empty(u.shape if needs_da else 0), d_gate, d_scale, [torch.empty_like(t) for t in factors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, ctx.axes, ctx.combine, ctx.frames, gate, scale, factors = inputs
    _, u, difference, lows = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, difference, gate, scale, *lows, *factors)


def _backward(ctx: Any, grad: Tensor | None, *_: Any, gradients: Any = _backward_op) -> tuple[Any, ...]:
    u, difference, gate, scale, *rest = ctx.saved_tensors
    lows, factors = rest[: len(rest) // 5], rest[len(rest) // 5 :]
    if grad is None:
        return None, None, None, None, None, None, None, [None] * len(factors)
    refuse_second_derivative("low_rank_mixer")
    da, d_gate, d_scale, d_factors = gradients(
        grad, u, difference, lows, ctx.axes, ctx.combine, ctx.frames, gate, scale, factors, ctx.needs_input_grad[1]
    )
    d_gate, d_scale = (None if t is None else d for t, d in ((gate, d_gate), (scale, d_scale)))
    return None, da if ctx.needs_input_grad[1] else None, None, None, None, d_gate, d_scale, d_factors


_op.register_autograd(_backward, setup_context=_setup_context)


class _OnCpu(torch.autograd.Function):
    """Autograd function without the wrapping of a torch.library op, a tenth of a small adaptor's time on a CPU."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        inputs = (*inputs[:7], list(inputs[7:]))
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *others, d_factors = _backward(ctx, grad, gradients=_gradients)
        return *others, *d_factors


def low_rank_mixer(
    b: Tensor,
    a: Tensor,
    axes: Sequence[str],
    factors: Sequence[Tensor],
    combine: str = "sum",
    frames: int = 1,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Apply one adaptor: returns the refinement after it, [P, N, D] in the dtype of b, differentiable in all but b.

    b, a: [P, N, D] in fp16, bf16, fp32 or fp64, any strides; b must need no gradient. axes: some of channel, token,
    space, time, in the order in which they are mixed. factors: for each axis of length n four of them, (W1 [r, n],
    c1 [r], W2 [n, r], c2 [n]), in the dtype of b or in fp32 (so are their gradients). combine: sum, replace or gated;
    gated wants `gate`, a scalar. scale: a scalar, or None for 1. frames: T; P is a multiple of it.
    Products in the dtype of b, with or without autocast; sums in fp32. Raises ValueError for what does not fit.
    """
    validate(b, a, MixerArgs(axes, combine, frames, gate, scale, factors))
    if is_transformed("low_rank_mixer", b, a, gate, scale, *factors):
        return low_rank_mixer_reference(b, a, axes, factors, combine, frames, gate, scale)
    inputs = b, a, " ".join(axes), combine, frames, gate, scale
    if b.device.type == "cpu" and not torch.compiler.is_compiling():
        return _OnCpu.apply(*inputs, *factors)
    return _op(*inputs, list(factors))[0]
