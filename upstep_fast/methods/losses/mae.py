"""MAE's masking, targets and loss (He et al. 2022; facebookresearch/mae, models_mae.py).

a random part of the patches is shown to the encoder; the decoder predicts the pixels of the others
y = (x - mean) / sqrt(var + 1e-6)           pixels of a patch, normalised by the patch's own mean and variance
L = mean over the hidden patches of mean (prediction - y)^2
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels by patch: [B, C, H, W] -> [B, N, p q C], rows first, channels last, as MAE orders them."""
    B, C, H, W = images.shape
    p, q = patch
    x = images.reshape(B, C, H // p, p, W // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // q), p * q * C)


def pixel_targets(images: Tensor, patch: tuple[int, int], normalise: bool = True) -> Tensor:
    """What the decoder is to predict, [B, N, p q C] in fp32; the variance is the unbiased one, as in MAE's code."""
    x = patchify(images.float(), patch)
    if not normalise:
        return x
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()


def split(noise: Tensor, hidden: float) -> tuple[Tensor, Tensor]:
    """Which patches are shown, from one random number for each: the smallest are.

    noise: [B, N]; hidden: the part that is not shown. Returns the shown patches' places [B, n] and a mask [B, N] bool
    of the hidden ones; n = int(N (1 - hidden)), at least 1.
    """
    shown = max(1, int(noise.shape[1] * (1 - hidden)))
    keep = noise.argsort(1)[:, :shown]
    return keep, torch.ones_like(noise, dtype=torch.bool).scatter_(1, keep, False)


def pixel_loss(prediction: Tensor, targets: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error on the hidden patches. prediction, targets: [B, N, P]; hidden: [B, N] bool; scalar, fp32."""
    error = (prediction.float() - targets).square().mean(-1)
    return (error * hidden).sum() / hidden.sum()
