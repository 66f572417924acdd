"""`low_rank_mixer` by the library's products: the form for CPUs, for clips and for whatever Triton does not take.

Of what is D wide, u alone is kept; the rest is computed again: two thin products and a norm a mixer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layer_norm import eager as layer_norm_plain
from ..layer_norm.op import layer_norm_backward, layer_norm_forward


def forward(
    b: Tensor,
    a: Tensor,
    axes: Sequence[str],
    combine: str,
    frames: int,
    gate: Tensor | None,
    scale: Tensor | None,
    factors: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What the op `low_rank_mixer` returns: out, u, b - a (empty unless gated) and each mixer's low."""
    u = b + a if gate is None else torch.lerp(a, b, gate.sigmoid().to(b.dtype))
    lows: list[Tensor] = []
    delta: Tensor | None = None
    for axis, (down, down_bias, up, up_bias) in zip(axes, fours(factors), strict=True):
        x = u if delta is None else u + delta
        lows.append(_project(_norm(x, eps)[0], down, down_bias, axis, frames))
        change = _spread(F.gelu(lows[-1]), up, up_bias, axis, u.shape)
        delta = change if delta is None else delta.add_(change)
    assert delta is not None
    out = (delta if scale is None else delta * scale.to(delta.dtype)).add_(b if combine == "replace" else a)
    return out, u, b.new_empty(0) if gate is None else b - a, lows


def backward(
    grad: Tensor,
    u: Tensor,
    difference: Tensor,
    lows: Sequence[Tensor],
    axes: Sequence[str],
    combine: str,
    frames: int,
    gate: Tensor | None,
    scale: Tensor | None,
    factors: Sequence[Tensor],
    eps: float,
    needs_da: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of a, gate, scale (None where there is none) and the factors."""
    g, fours_ = grad.contiguous(), fours(factors)  # the norm's kernel reads it by rows
    xs = [u]  # the mixers' inputs; the last change is wanted for the factor alone
    delta: Tensor | None = None
    for at in range(len(axes) - (scale is None)):
        _, _, up, up_bias = fours_[at]
        change = _spread(F.gelu(lows[at]), up, up_bias, axes[at], u.shape)
        delta = change if delta is None else delta.add_(change)
        xs.append(u + delta)
    d_delta, d_scale = g, None
    if scale is not None:
        assert delta is not None
        d_delta, d_scale = g * scale.to(g.dtype), (g * delta).sum(dtype=wide_dtype(g)).to(scale.dtype)
    # a plain sum: what goes round the adaptor is the gradient of delta, and the norms' backward adds it on the way
    joined = combine == "sum" and scale is None
    du = g if joined else torch.zeros_like(g)
    d_factors: list[Tensor] = []
    for at in reversed(range(len(axes))):
        needs_dx = at > 0 or needs_da or gate is not None
        x_hat, rstd = _norm(xs[at], eps)
        d_change = du if joined else d_delta + du
        d_hat, of_factors = _mixer_backward(d_change, x_hat, lows[at], fours_[at], axes[at], frames, needs_dx)
        d_factors[:0] = of_factors
        if d_hat is not None:
            du = _norm_backward(d_hat, x_hat, rstd, du)
    d_gate = None
    if gate is not None:
        share = gate.sigmoid()
        d_gate = share * (1 - share) * (du * difference).sum(dtype=wide_dtype(g)).to(gate.dtype)
        du = du * (1 - share).to(du.dtype)
    if not needs_da:
        return None, d_gate, d_scale, d_factors
    return du if joined or combine == "replace" else g + du, d_gate, d_scale, d_factors


def _mixer_backward(
    d: Tensor, x_hat: Tensor, low: Tensor, factors: Sequence[Tensor], axis: str, frames: int, needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of x_hat and of (down, its bias, up, its bias), from that of the mixer's output."""
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
    """Weight [m, n] times each of x [P, n, Q], plus a bias a row."""
    weights = weight.to(x.dtype).expand(len(x), -1, -1)
    return torch.bmm(weights, x) if bias is None else torch.baddbmm(bias.to(x.dtype)[:, None], weights, x)


def _columns(x: Tensor, axis: str, frames: int) -> Tensor:
    """[B T, N, D] with the axis in the middle: tokens [B T, N, D], time [B, T, N D]."""
    return x.reshape(-1, frames, x.shape[1] * x.shape[2]) if axis == "time" else x


def _norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x_hat, rstd [..., 1])."""
    if not _has_kernel(x):
        return layer_norm_plain.forward(x, eps)
    done = layer_norm_forward(x, eps)
    assert done.y is not None
    return done.y, done.rstd[..., None]


def _norm_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor) -> Tensor:
    if not _has_kernel(d):
        return layer_norm_plain.backward(d, x_hat, rstd, around)
    return layer_norm_backward(d, x_hat, rstd[..., 0], around)[0]


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The type of sums over many tokens."""
    return torch.promote_types(x.dtype, torch.float32)


def fours(factors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The factors, (down, its bias, up, its bias) a mixer."""
    return [factors[i : i + 4] for i in range(0, len(factors), 4)]
