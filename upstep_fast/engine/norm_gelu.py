"""Norm and GELU of a block: forward and hand-written backward.

    norm    total = x + delta;  x_hat = (total - mean) rstd
            d_total = rstd (d - mean d - x_hat mean(d x_hat)) + the gradient of the skip connection
            RMSNorm: without the two means, rstd = 1 / sqrt(mean total^2 + eps)
    gelu    g = u Phi(u);  dg/du from u, or from one byte per entry (kernels/gelu.py)

Each has two forms. Fused: the kernels of kernels/layer_norm and kernels/gelu.py, one pass each, for 16 bit on a GPU.
Plain: for fp32, where the derivative must be exact, for RMSNorm, and for CPUs: torch's ops, or the compiled passes of
kernels/block_passes.py where those are faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.projections import EPILOGUES, MergedProjection, PackedProjection, Projection, Quantized
from upstep_fast.kernels import block_passes
from upstep_fast.kernels.gelu import gelu_backward as backward_from_byte
from upstep_fast.kernels.gelu import gelu_forward as forward_with_byte
from upstep_fast.kernels.layer_norm import layer_norm_backward, layer_norm_forward

_APPROXIMATE = {"erf": "none", "tanh": "tanh", "quick": "quick"}


def norm(
    x: Tensor, delta: Tensor | None, eps: float, fused: bool, fp8: bool = False, rms: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | Quantized]:
    """Normalize total = x + delta, [..., D]. Returns (x_hat, total, rstd [..., 1] fp32, x_hat as input of a product).

    fp8: quantize the latter for an fp8 product, in the pass of the fused form. rms: RMSNorm.
    """
    if fused and not rms:
        out = layer_norm_forward(x, eps, residual=delta, fp8=fp8)
        assert out.y is not None
        return out.y, out.h, out.rstd[..., None], _product_input(out.y, out.q, out.scale)
    if not rms:
        x_hat, total, rstd = block_passes.norm(x, delta, eps)
        return x_hat, total, rstd, x_hat
    total = x if delta is None else x + delta
    wide, rstd = standardize(total, eps, rms)
    x_hat = wide.to(total.dtype)
    return x_hat, total, rstd, x_hat


def norm_backward(
    d: Tensor, x_hat: Tensor, rstd: Tensor, d_skip: Tensor | None, fused: bool, fp8: bool = False, rms: bool = False
) -> tuple[Tensor, Tensor | Quantized]:
    """Return the gradient of the total, plain and as input of a product, from the gradient d of x_hat.

    d_skip: gradient of the skip connection, added to the total's; None: there is no skip connection.
    """
    if fused and not rms:
        dx, q, scale = layer_norm_backward(d, x_hat, rstd[..., 0], d_skip, fp8=fp8)
        return dx, _product_input(dx, q, scale)
    if rms:
        dx = standardize_backward(d.float(), x_hat, rstd, rms).to(d.dtype)
        dx = dx if d_skip is None else dx.add_(d_skip)
    else:
        dx = block_passes.norm_backward(d, x_hat, rstd, d_skip)
    return dx, dx


def standardize(x: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Standardize x [..., D] over the last dimension. Returns (x_hat, rstd [..., 1]) in fp32."""
    x = x.float()
    x = x if rms else x - x.mean(-1, keepdim=True)
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * rstd, rstd


def standardize_backward(d: Tensor, x_hat: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """Return the gradient of x in fp32, from the gradient d of x_hat."""
    d = d if rms else d - d.mean(-1, keepdim=True)
    return rstd * (d - x_hat * (d * x_hat).mean(-1, keepdim=True))


def _product_input(dequantized: Tensor | None, q: Tensor | None, scale: Tensor | None) -> Tensor | Quantized:
    if q is not None and scale is not None:
        return Quantized(q, scale, dequantized)
    assert dequantized is not None
    return dequantized


def gelu(u: Tensor, activation: str) -> Tensor:
    """Compute GELU (Hendrycks and Gimpel 2016); erf: u Phi(u), tanh: its approximation, quick: u sigmoid(1.702 u)."""
    if activation == "quick":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="tanh" if activation == "tanh" else "none")


def linear_gelu(x: Tensor | Quantized, projection: Projection, activation: str, fused: bool) -> Tensor:
    """Compute gelu(x W^T + c) for x [..., K], saving nothing."""
    if activation == "tanh" and isinstance(x, Tensor) and x.is_cuda and isinstance(projection, MergedProjection):
        # cuBLAS has the tanh form in the epilogue of its product
        y = torch._addmm_activation(projection.bias, x.flatten(0, -2), projection.weight.T, use_gelu=True)
        return y.view(*x.shape[:-1], -1)
    if isinstance(projection, PackedProjection) and isinstance(x, Tensor) and activation in EPILOGUES:
        return projection.gelu_product(x, activation)
    u = projection.product(x)
    # as in training: without erf, which takes twice as long as reading and writing u
    return forward_with_byte(u, _APPROXIMATE[activation], save_derivative=False)[0] if fused else gelu(u, activation)


def gelu_forward(u: Tensor, activation: str, as_byte: bool, fp8: bool = False) -> tuple[Tensor | Quantized, Tensor]:
    """Return (g, the tensor to save: u, or the derivative in one byte). fp8: g for an fp8 product only."""
    if not as_byte:
        return gelu(u, activation), u
    g, byte, scale = forward_with_byte(u, _APPROXIMATE[activation], fp8=fp8)
    assert byte is not None
    return g if scale is None else Quantized(g, scale, None), byte


def gelu_pass(u: Tensor, activation: str, derivative: bool) -> Tensor | None:
    """Compute GELU where a CPU has it in one pass with its derivative (`block_passes.gelu`), else return None."""
    return block_passes.gelu(u, _APPROXIMATE[activation], derivative)


def gelu_backward(dg: Tensor, saved: Tensor, activation: str, fp8: bool = False) -> Tensor | Quantized:
    """Compute dg gelu'(u) from the saved tensor. fp8: for an fp8 product only."""
    if saved.dtype == torch.uint8:
        du, scale = backward_from_byte(dg, saved, fp8=fp8)
        return du if scale is None else Quantized(du, scale, None)
    if activation == "quick":
        s = torch.sigmoid(1.702 * saved)
        return dg * (s + 1.702 * saved * s * (1 - s))
    return torch.ops.aten.gelu_backward(dg, saved, approximate="tanh" if activation == "tanh" else "none")
