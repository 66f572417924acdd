"""What some models do to q and k, head by head, before they meet.

    z = [gamma_q q_hat + beta_q,  gamma_k k_hat + beta_k,  v]       qk-norm: a norm over a head's width (pieces.py)

Backward starts from y = [q, k, v] itself, which is what a block keeps; z is made again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upstep_fast.engine.norm_gelu import standardise, standardise_backward


@dataclass(frozen=True)
class HeadNorm:
    """The norms of q and k over a head's width d."""

    gamma: Tensor  # [2, 1, d], fp32: of q, of k
    beta: Tensor  # the same; zeros for RMSNorm
    eps: float
    rms: bool


def qk_norm(y: Tensor, heads: int, norm: HeadNorm | None) -> Tensor:
    """Z from y, packed qkv [..., 3 D]; y itself where nothing is done."""
    if norm is None:
        return y
    z = torch.empty_like(y)
    (q_k, v), (new_q_k, new_v) = _split(y, heads), _split(z, heads)
    x_hat, _ = standardise(q_k, norm.eps, norm.rms)
    new_q_k.copy_(torch.addcmul(norm.beta, x_hat, norm.gamma))
    new_v.copy_(v)
    return z


def qk_norm_backward(dz: Tensor, y: Tensor, heads: int, norm: HeadNorm | None) -> Tensor:
    """Dy from dz, written over it, and from y."""
    if norm is not None:
        q_k, d_q_k = _split(y, heads)[0], _split(dz, heads)[0]
        x_hat, rstd = standardise(q_k, norm.eps, norm.rms)
        d_q_k.copy_(standardise_backward(d_q_k * norm.gamma, x_hat, rstd, norm.rms))
    return dz


def _split(y: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Q and k [..., 2, H, d], and v [..., H, d], as views."""
    parts = y.unflatten(-1, (3, heads, -1))
    return parts[..., :2, :, :], parts[..., 2, :, :]
