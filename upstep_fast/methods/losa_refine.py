"""One adaptor of LoSA as a function with a hand-written backward that keeps little.

    u = b + a                          gated: s b + (1 - s) a, s = sigmoid(g)
    x_0 = u;  x_{i+1} = x_i + c_i      c_i = W2 gelu(low_i) + c2, low_i = W1 norm(x_i) + c1, along the i-th axis
    out = a + alpha sum c_i            replace: b + alpha sum c_i

Backward, with g the gradient of out and d_i that of c_i, from the last mixer to the first:

    d_i = alpha g + du_{i+1}           du_i = du_{i+1} + norm'(W1^T (gelu'(low_i) W2^T d_i)),  du_k = 0
    da  = g + du_0                     replace: du_0; gated: g + (1 - s) du_0
    d alpha = sum g sum c_i            dg = s (1 - s) sum du_0 (b - a)

Kept, in 16 bit: u, 2 D bytes a token (gated: b - a too), and low_i: r values a token along channels, r D / N along
tokens. Of what is D wide the rest is computed again: two thin products and a norm a mixer. b gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.pieces import norm, norm_backward

EPS = 1e-6  # of the bare norms, as timm's ViTs have it


def refine(
    b: Tensor,
    a: Tensor,
    axes: tuple[str, ...],
    combine: str,
    frames: int,
    gate: Tensor | None,
    scale: Tensor | None,
    factors: Sequence[Tensor],
) -> Tensor:
    """a_l, [B T, N, D], from b_l and a_{l-1} of the same shape and type; differentiable in all but b.

    axes: channel, token, space or time, in order. frames: T. factors: for each axis of length n (down [r, n], its bias
    [r], up [n, r], its bias [n]). gate, scale: scalars or None. Sums run in the type of b.
    """
    return _Refine.apply(b, a, axes, combine, frames, gate, scale, *factors)


class _Refine(torch.autograd.Function):
    """One adaptor; backward computes again what is wide."""

    @staticmethod
    def forward(
        ctx: Any,
        b: Tensor,
        a: Tensor,
        axes: tuple[str, ...],
        combine: str,
        frames: int,
        gate: Tensor | None,
        scale: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        with torch.autocast(b.device.type, enabled=False):
            u = b + a if gate is None else torch.lerp(a, b, gate.sigmoid().to(b.dtype))
            lows: list[Tensor] = []
            delta: Tensor | None = None
            for axis, (down, down_bias, up, up_bias) in zip(axes, _fours(factors), strict=True):
                x = u if delta is None else u + delta
                lows.append(_project(_norm(x)[0], down, down_bias, axis, frames))
                change = _spread(F.gelu(lows[-1]), up, up_bias, axis, u.shape)
                delta = change if delta is None else delta.add_(change)
            assert delta is not None
            out = (delta if scale is None else delta * scale.to(delta.dtype)).add_(b if combine == "replace" else a)
        ctx.axes, ctx.combine, ctx.frames = axes, combine, frames
        ctx.save_for_backward(u, None if gate is None else b - a, gate, scale, *lows, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, difference, gate, scale, *rest = ctx.saved_tensors
        g = grads[0].contiguous()  # the norm's kernel reads it by rows
        lows, factors, axes = rest[: len(ctx.axes)], _fours(rest[len(ctx.axes) :]), ctx.axes
        xs = [u]  # the mixers' inputs; the last change is wanted for the factor alone
        delta: Any = None
        for at in range(len(axes) - (scale is None)):
            _, _, up, up_bias = factors[at]
            change = _spread(F.gelu(lows[at]), up, up_bias, axes[at], u.shape)
            delta = change if delta is None else delta.add_(change)
            xs.append(u + delta)
        d_scale = None if scale is None else (g * delta).sum(dtype=_wide(g)).to(scale.dtype)
        d_delta = g if scale is None else g * scale.to(g.dtype)
        # a plain sum: what goes round the adaptor is the gradient of delta, and the norms' backward adds it on the way
        joined = ctx.combine == "sum" and scale is None
        du = g if joined else torch.zeros_like(g)
        d_factors: list[Tensor] = []
        for at in reversed(range(len(axes))):
            needs_dx = at > 0 or ctx.needs_input_grad[1] or gate is not None
            x_hat, rstd = _norm(xs[at])
            d_change = du if joined else d_delta + du
            d_hat, of_factors = _mixer_backward(d_change, x_hat, lows[at], factors[at], axes[at], ctx.frames, needs_dx)
            d_factors[:0] = of_factors
            if d_hat is not None:
                du, _ = norm_backward(d_hat, x_hat, rstd, du, _fused(d_hat))
        d_gate = None
        if gate is not None:
            share = gate.sigmoid()
            d_gate = share * (1 - share) * (du * difference).sum(dtype=_wide(g)).to(gate.dtype)
            du = du * (1 - share).to(du.dtype)
        da = du if joined or ctx.combine == "replace" else g + du
        return None, da, None, None, None, d_gate, d_scale, *d_factors


def _mixer_backward(
    d: Tensor, x_hat: Tensor, low: Tensor, factors: Sequence[Tensor], axis: str, frames: int, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of x_hat and of (down, its bias, up, its bias), from that of the mixer's output."""
    down, down_bias, up, up_bias = factors
    g = F.gelu(low)
    if axis == "channel":
        d_rows, g_rows = d.flatten(0, -2), g.flatten(0, -2)
        d_low = torch.ops.aten.gelu_backward(d_rows @ up.to(d.dtype), low.flatten(0, -2))
        d_up, d_up_bias = d_rows.T @ g_rows, d_rows.sum(0, dtype=_wide(d))
        d_down, d_down_bias = d_low.T @ x_hat.flatten(0, -2), d_low.sum(0, dtype=_wide(d))
        d_hat = (d_low @ down.to(d.dtype)).view_as(x_hat) if needs_dx else None
    else:
        d_cols, hat_cols = _columns(d, axis, frames), _columns(x_hat, axis, frames)
        d_low = torch.ops.aten.gelu_backward(_left(up.T, d_cols), low)
        d_up, d_up_bias = torch.bmm(d_cols, g.mT).sum(0, dtype=_wide(d)), d_cols.sum((0, 2), dtype=_wide(d))
        d_down = torch.bmm(d_low, hat_cols.mT).sum(0, dtype=_wide(d))
        d_down_bias = d_low.sum((0, 2), dtype=_wide(d))
        d_hat = _left(down.T, d_low).view_as(x_hat) if needs_dx else None
    pairs = ((d_down, down), (d_down_bias, down_bias), (d_up, up), (d_up_bias, up_bias))
    return d_hat, [d_p.to(p.dtype) for d_p, p in pairs]


def _project(x_hat: Tensor, down: Tensor, bias: Tensor, axis: str, frames: int) -> Tensor:
    """W1 x_hat + c1: [B T, N, r] along channels, else [P, r, Q] with the axis in the middle."""
    if axis == "channel":
        return F.linear(x_hat, down.to(x_hat.dtype), bias.to(x_hat.dtype))
    return _left(down, _columns(x_hat, axis, frames), bias)


def _spread(g: Tensor, up: Tensor, bias: Tensor, axis: str, shape: torch.Size) -> Tensor:
    """W2 g + c2, in the shape of x."""
    if axis == "channel":
        return F.linear(g, up.to(g.dtype), bias.to(g.dtype))
    return _left(up, g, bias).view(shape)


def _left(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [m, n] times each of x [P, n, Q], plus a bias a row."""
    weights = weight.to(x.dtype).expand(len(x), -1, -1)
    return torch.bmm(weights, x) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], weights, x)


def _columns(x: Tensor, axis: str, frames: int) -> Tensor:
    """[B T, N, D] with the axis in the middle: tokens [B T, N, D], time [B, T, N D]."""
    return x.reshape(-1, frames, x.shape[1] * x.shape[2]) if axis == "time" else x


def _norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat, rstd)."""
    x_hat, _, rstd, _ = norm(x, None, EPS, _fused(x))
    return x_hat, rstd


def _fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _wide(x: Tensor) -> torch.dtype:
    """The type of sums over many tokens."""
    return torch.promote_types(x.dtype, torch.float32)


def _fours(factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    return [factors[i : i + 4] for i in range(0, len(factors), 4)]
