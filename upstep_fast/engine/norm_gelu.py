"""The parts of a block between its products, each a forward with its hand-written backward.

    norm    total = x + delta;  x_hat = (total - mean) rstd
            d_total = rstd (d - mean d - x_hat mean(d x_hat)) + the gradient that goes round the norm
            RMSNorm: the same without the two means, rstd = 1 / sqrt(mean total^2 + eps)
    gelu    g = u Phi(u);  dg/du from u itself, or from one byte an entry (kernels/gelu.py)

Each has two forms. Fused: the kernels of kernels/layer_norm and gelu.py, one pass each, for 16 bit on a GPU. Plain:
the library's ops, for CPUs and for fp32, where the derivative must be exact, and for RMSNorm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.projections import MergedProjection, Projection, Quantized
from upstep_fast.kernels.gelu import gelu_backward as backward_from_byte
from upstep_fast.kernels.gelu import gelu_forward as forward_with_byte
from upstep_fast.kernels.layer_norm import eager as layer_norm_plain
from upstep_fast.kernels.layer_norm import layer_norm_backward, layer_norm_forward

_APPROXIMATE = {"erf": "none", "tanh": "tanh", "quick": "quick"}


def norm(
    x: Tensor, delta: Tensor | None, eps: float, fused: bool, fp8: bool = False, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | Quantized]:
    """(x_hat, total, rstd, x_hat for a product) of x + delta, [..., D]; rstd [..., 1] in fp32.

    fp8: for an fp8 product, quantised in the same pass where the form is fused. rms: RMSNorm.
    """
    if fused and not rms:
        done = layer_norm_forward(x, eps, residual=delta, fp8=fp8)
        assert done.y is not None
        return done.y, done.h, done.rstd[..., None], _as_given(done.y, done.q, done.scale)
    total = x if delta is None else x + delta
    if rms:
        x_hat, rstd = standardise(total, eps, rms)
        x_hat = x_hat.to(total.dtype)
    else:
        x_hat, rstd = layer_norm_plain.forward(total, eps)
    return x_hat, total, rstd, x_hat


def norm_backward(
    d: Tensor, x_hat: Tensor, rstd: Tensor, around: Tensor | None, fused: bool, fp8: bool = False, rms: bool = False
) -> tuple[Tensor, Tensor | Quantized]:
    """(the gradient of the total, the same for a product), from that of x_hat and the one that goes round the norm.

    around: None where nothing goes round it.
    """
    if fused and not rms:
        dx, q, scale = layer_norm_backward(d, x_hat, rstd[..., 0], around, fp8=fp8)
        return dx, _as_given(dx, q, scale)
    if rms:
        dx = standardise_backward(d.float(), x_hat, rstd, rms).to(d.dtype)
        dx = dx if around is None else dx.add_(around)
    else:
        dx = layer_norm_plain.backward(d, x_hat, rstd, around)
    return dx, dx


def standardise(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """(x_hat, rstd [..., 1]) over the last dimension, in fp32, by the formula."""
    x = x.float()
    x = x if rms else x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def standardise_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """The gradient of x, from that of x_hat, in fp32."""
    d = d if rms else d - d.mean(-1, keepdim=True)
    return rstd * (d - x_hat * (d * x_hat).mean(-1, keepdim=True))


def _as_given(wide: Tensor | None, q: Tensor | None, scale: Tensor | None) -> Tensor | Quantized:
    if q is not None and scale is not None:
        return Quantized(q, scale, wide)
    assert wide is not None
    return wide


def gelu(u: Tensor, activation: str) -> Tensor:
    """erf: u Phi(u). tanh: its tanh approximation. quick: u sigmoid(1.702 u)."""
    if activation == "quick":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="tanh" if activation == "tanh" else "none")


def linear_gelu(x: Tensor | Quantized, projection: Projection, activation: str) -> Tensor:
    """Gelu of the product, where nothing is kept; x: [..., K]."""
    if activation == "tanh" and isinstance(x, Tensor) and x.is_cuda and isinstance(projection, MergedProjection):
        # the form that cuBLAS has in the product's epilogue
        y = torch._addmm_activation(projection.bias, x.flatten(0, -2), projection.weight.T, use_gelu=True)
        return y.view(*x.shape[:-1], -1)
    return gelu(projection.product(x), activation)


def gelu_forward(u: Tensor, activation: str, as_byte: bool, fp8: bool = False) -> tuple[Tensor | Quantized, Tensor]:
    """(g, what `gelu_backward` takes: u, or the derivative in one byte). fp8: g as an fp8 product alone wants it."""
    if not as_byte:
        return gelu(u, activation), u
    g, byte, scale = forward_with_byte(u, _APPROXIMATE[activation], fp8=fp8)
    assert byte is not None
    return g if scale is None else Quantized(g, scale, None), byte


def gelu_backward(dg: Tensor, kept: Tensor, activation: str, fp8: bool = False) -> Tensor | Quantized:
    """Dg gelu'(u), from what `gelu_forward` kept. fp8: as an fp8 product alone wants it."""
    if kept.dtype == torch.uint8:
        du, scale = backward_from_byte(dg, kept, fp8=fp8)
        return du if scale is None else Quantized(du, scale, None)
    if activation == "quick":
        s = torch.sigmoid(1.702 * kept)
        return dg * (s + 1.702 * kept * s * (1 - s))
    return torch.ops.aten.gelu_backward(dg, kept, approximate="tanh" if activation == "tanh" else "none")
