"""The parts of a block between its products, each a forward with its hand-written backward.

    norm    total = x + delta;  x_hat = (total - mean) rstd
            d_total = rstd (d - mean d - x_hat mean(d x_hat)) + the gradient that goes round the norm
    gelu    g = u Phi(u);  dg/du from u itself, or from one byte an entry (kernels/gelu.py)

Each has two forms. Fused: the kernels of kernels/layer_norm.py and gelu.py, one pass each, for 16 bit on a GPU. Plain:
the library's ops, for CPUs and for fp32, where the derivative must be exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gelu import gelu_backward as backward_from_byte
from ..kernels.gelu import gelu_forward as forward_with_byte
from ..kernels.layer_norm import layer_norm_backward, layer_norm_forward

_APPROXIMATE = {"erf": "none", "tanh": "tanh", "quick": "quick"}


def norm(x: Tensor, delta: Tensor | None, eps: float, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x_hat, total, rstd) of x + delta, [..., D]; rstd [..., 1] in fp32."""
    if fused:
        done = layer_norm_forward(x, eps, residual=delta)
        assert done.y is not None
        return done.y, done.h, done.rstd[..., None]
    total = x if delta is None else x + delta
    # a CPU gives the statistics in the type of the weight: without one they would be rounded to bf16
    width = total.shape[-1:]
    weight = total.new_ones(width, dtype=torch.float32) if total.dtype in (torch.float16, torch.bfloat16) else None
    bias = None if weight is None else torch.zeros_like(weight)
    x_hat, _, rstd = torch.native_layer_norm(total, width, weight, bias, eps)
    return x_hat, total, rstd


def norm_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor, fused: bool) -> Tensor:
    """The gradient of the total, from that of x_hat and the one that goes round the norm."""
    if fused:
        return layer_norm_backward(d, x_hat, rstd[..., 0], around)[0]
    # the library's op, told that its input was already normalised: mean 0, rstd 1
    zero, one = (torch.full_like(rstd, value, dtype=d.dtype) for value in (0.0, 1.0))
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        d, x_hat, x_hat.shape[-1:], zero, one, None, None, [True, False, False]
    )
    return dx.mul_(rstd).add_(around)


def gelu(u: Tensor, activation: str) -> Tensor:
    """erf: u Phi(u). tanh: its tanh approximation. quick: u sigmoid(1.702 u)."""
    if activation == "quick":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="tanh" if activation == "tanh" else "none")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """gelu(x weight^T + bias) where nothing is kept; x: [..., K]."""
    if activation == "tanh" and x.is_cuda:  # the form that cuBLAS has in the product's epilogue
        y = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
        return y.view(*x.shape[:-1], -1)
    return gelu(F.linear(x, weight, bias), activation)


def gelu_forward(u: Tensor, activation: str, as_byte: bool) -> tuple[Tensor, Tensor]:
    """(g, what `gelu_backward` takes: u, or the derivative in one byte)."""
    if not as_byte:
        return gelu(u, activation), u
    g, byte, _ = forward_with_byte(u, _APPROXIMATE[activation])
    assert byte is not None
    return g, byte


def gelu_backward(dg: Tensor, kept: Tensor, activation: str) -> Tensor:
    """dg gelu'(u), from what `gelu_forward` kept."""
    if kept.dtype == torch.uint8:
        return backward_from_byte(dg, kept)[0]
    if activation == "quick":
        s = torch.sigmoid(1.702 * kept)
        return dg * (s + 1.702 * kept * s * (1 - s))
    return torch.ops.aten.gelu_backward(dg, kept, approximate="tanh" if activation == "tanh" else "none")
