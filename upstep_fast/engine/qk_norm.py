"""QK-norm: per-head normalization of q and k before attention (Henry et al. 2020; ViT-22B, Dehghani et al. 2023).

    z = [gamma_q q_hat + beta_q,  gamma_k k_hat + beta_k,  v]       q_hat, k_hat: normalized over a head's width d

A block saves y = [q, k, v]; backward computes q_hat and k_hat again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upstep_fast.engine.norm_gelu import standardize, standardize_backward


@dataclass(frozen=True)
class HeadNorm:
    """The norms of q and k over a head's width d."""

    gamma: Tensor  # [2, 1, d], fp32: of q, of k
    beta: Tensor  # [2, 1, d], fp32; zeros for RMSNorm
    eps: float
    rms: bool


def qk_norm(y: Tensor, heads: int, norm: HeadNorm | None) -> Tensor:
    """Normalize q and k of packed qkv y [..., 3 D]; returns y itself if the model has no QK-norm."""
    if norm is None:
        return y
    z = torch.empty_like(y)
    (q_k, v), (new_q_k, new_v) = _split(y, heads), _split(z, heads)
    x_hat, _ = standardize(q_k, norm.eps, norm.rms)
    new_q_k.copy_(torch.addcmul(norm.beta, x_hat, norm.gamma))
    new_v.copy_(v)
    return z


def qk_norm_backward(dz: Tensor, y: Tensor, heads: int, norm: HeadNorm | None) -> Tensor:
    """Return the gradient of y [..., 3 D], written over dz."""
    if norm is not None:
        q_k, d_q_k = _split(y, heads)[0], _split(dz, heads)[0]
        x_hat, rstd = standardize(q_k, norm.eps, norm.rms)
        d_q_k.copy_(standardize_backward(d_q_k * norm.gamma, x_hat, rstd, norm.rms))
    return dz


def _split(y: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Split packed qkv into q and k [..., 2, H, d] and v [..., H, d], as views."""
    parts = y.unflatten(-1, (3, heads, -1))
    return parts[..., :2, :, :], parts[..., 2, :, :]
