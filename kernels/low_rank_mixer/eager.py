"""Eager form of `low_rank_mixer`, by library products.

Of the tensors that are D wide only u is saved; backward computes the rest again: two thin products and a norm a mixer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_norm import eager as layer_norm_eager
from ..layer_norm.bare import layer_norm_backward, layer_norm_forward
from .args import MixerArgs


def forward(b: Tensor, a: Tensor, args: MixerArgs) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (out, u, b - a, each mixer's low); b - a is empty unless gated."""
    u = b + a if args.gate is None else torch.lerp(a, b, args.gate.sigmoid().to(b.dtype))
    lows: list[Tensor] = []
    delta: Tensor | None = None
    for axis, (down, down_bias, up, up_bias) in zip(args.axes, args.fours, strict=True):
        x = u if delta is None else u + delta
        lows.append(_project(_norm(x, args.eps)[0], down, down_bias, axis, args.frames))
        change = _spread(F.gelu(lows[-1]), up, up_bias, axis, u.shape)
        delta = change if delta is None else delta.add_(change)
    assert delta is not None
    out = (delta if args.scale is None else delta * args.scale.to(delta.dtype)).add_(
        b if args.combine == "replace" else a
    )
    return out, u, b.new_empty(0) if args.gate is None else b - a, lows


def backward(
    grad: Tensor, u: Tensor, difference: Tensor, lows: Sequence[Tensor], args: MixerArgs, needs_da: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Return the gradients of a, gate, scale (None where there is none) and of the factors."""
    g, gate, scale = grad.contiguous(), args.gate, args.scale  # the norm's kernel reads g by rows
    xs, delta = _mixer_inputs(u, lows, args)
    d_delta, d_scale = g, None
    if scale is not None:
        assert delta is not None
        d_delta, d_scale = g * scale.to(g.dtype), (g * delta).sum(dtype=wide_dtype(g)).to(scale.dtype)
    # a plain sum: the gradient around the adaptor is that of delta, and the norms' backward adds it on the way
    is_joined = args.combine == "sum" and scale is None
    du = g if is_joined else torch.zeros_like(g)
    d_factors: list[Tensor] = []
    for at in reversed(range(len(args.axes))):
        needs_dx = at > 0 or needs_da or gate is not None
        x_hat, rstd = _norm(xs[at], args.eps)
        d_change = du if is_joined else d_delta + du
        four, axis = args.fours[at], args.axes[at]
        d_hat, d_four = _mixer_backward(d_change, x_hat, lows[at], four, axis, args.frames, needs_dx)
        d_factors[:0] = d_four
        if d_hat is not None:
            du = _norm_backward(d_hat, x_hat, rstd, du)
    d_gate = None
    if gate is not None:
        share = gate.sigmoid()
        d_gate = share * (1 - share) * (du * difference).sum(dtype=wide_dtype(g)).to(gate.dtype)
        du = du * (1 - share).to(du.dtype)
    if not needs_da:
        return None, d_gate, d_scale, d_factors
    return du if is_joined or args.combine == "replace" else g + du, d_gate, d_scale, d_factors


def _mixer_inputs(u: Tensor, lows: Sequence[Tensor], args: MixerArgs) -> tuple[list[Tensor], Tensor | None]:
    """Return the mixers' inputs, computed again, and the sum of the changes (with the last one only if scaled)."""
    xs = [u]
    delta: Tensor | None = None
    for at in range(len(args.axes) - (args.scale is None)):
        _, _, up, up_bias = args.fours[at]
        change = _spread(F.gelu(lows[at]), up, up_bias, args.axes[at], u.shape)
        delta = change if delta is None else delta.add_(change)
        xs.append(u + delta)
    return xs, delta


def _mixer_backward(
    d: Tensor, x_hat: Tensor, low: Tensor, factors: Sequence[Tensor], axis: str, frames: int, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x_hat and of (W1, c1, W2, c2) from d, that of the mixer's output."""
    down, down_bias, up, up_bias = factors
    g = F.gelu(low)
    if axis == "channel":
        d_rows, g_rows = d.flatten(0, -2), g.flatten(0, -2)
        d_low = torch.ops.aten.gelu_backward(d_rows @ up.to(d.dtype), low.flatten(0, -2))
        d_up, d_up_bias = d_rows.T @ g_rows, d_rows.sum(0, dtype=wide_dtype(d))
        d_down, d_down_bias = d_low.T @ x_hat.flatten(0, -2), d_low.sum(0, dtype=wide_dtype(d))
        d_hat = (d_low @ down.to(d.dtype)).view_as(x_hat) if needs_dx else None
    else:
        d_cols, hat_cols = _columns(d, axis, frames), _columns(x_hat, axis, frames)
        d_low = torch.ops.aten.gelu_backward(_left(up.T, d_cols), low)
        d_up, d_up_bias = torch.bmm(d_cols, g.mT).sum(0, dtype=wide_dtype(d)), d_cols.sum((0, 2), dtype=wide_dtype(d))
        d_down = torch.bmm(d_low, hat_cols.mT).sum(0, dtype=wide_dtype(d))
        d_down_bias = d_low.sum((0, 2), dtype=wide_dtype(d))
        d_hat = _left(down.T, d_low).view_as(x_hat) if needs_dx else None
    pairs = ((d_down, down), (d_down_bias, down_bias), (d_up, up), (d_up_bias, up_bias))
    return d_hat, [d_p.to(p.dtype) for d_p, p in pairs]


def _project(x_hat: Tensor, down: Tensor, bias: Tensor, axis: str, frames: int) -> Tensor:
    """Compute W1 x_hat + c1: [B T, N, r] along channels, else [P, r, Q] with the axis in the middle."""
    if axis == "channel":
        return F.linear(x_hat, down.to(x_hat.dtype), bias.to(x_hat.dtype))
    return _left(down, _columns(x_hat, axis, frames), bias)


def _spread(g: Tensor, up: Tensor, bias: Tensor, axis: str, shape: torch.Size) -> Tensor:
    """Compute W2 g + c2 in `shape`."""
    if axis == "channel":
        return F.linear(g, up.to(g.dtype), bias.to(g.dtype))
    return _left(up, g, bias).view(shape)


def _left(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply weight [m, n] with each of x [P, n, Q] and add a bias a row."""
    weights = weight.to(x.dtype).expand(len(x), -1, -1)
    return torch.bmm(weights, x) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], weights, x)


def _columns(x: Tensor, axis: str, frames: int) -> Tensor:
    """View x [B T, N, D] with the axis in the middle: tokens [B T, N, D], time [B, T, N D]."""
    return x.reshape(-1, frames, x.shape[1] * x.shape[2]) if axis == "time" else x


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x_hat, rstd [..., 1])."""
    if not _has_kernel(x):
        return layer_norm_eager.forward(x, eps)
    result = layer_norm_forward(x, eps)
    assert result.y is not None
    return result.y, result.rstd[..., None]


def _norm_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor) -> Tensor:
    if not _has_kernel(d):
        return layer_norm_eager.backward(d, x_hat, rstd, around)
    return layer_norm_backward(d, x_hat, rstd[..., 0], around)[0]


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the type of sums over many tokens: fp32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)
