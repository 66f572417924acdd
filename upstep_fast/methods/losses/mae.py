"""MAE's masking, targets and loss (He et al. 2022; facebookresearch/mae, models_mae.py).

a random part of the patches is visible to the encoder; the decoder predicts the pixels of the others
y = (x - mean) / sqrt(var + 1e-6)           pixels of a patch, normalized by the patch's own mean and variance
L = mean over the masked patches of mean (prediction - y)^2
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Arrange pixels by patch: [B, C, H, W] -> [B, N, p q C], rows first, channels last, as MAE orders them."""
    B, C, H, W = images.shape
    p, q = patch
    x = images.reshape(B, C, H // p, p, W // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // p) * (W // q), p * q * C)


def pixel_targets(images: Tensor, patch: tuple[int, int], normalize: bool = True) -> Tensor:
    """Return the decoder's targets, [B, N, p q C] in fp32; the variance is the unbiased one, as in MAE's code."""
    x = patchify(images.float(), patch)
    if not normalize:
        return x
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()


def split(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Choose the visible patches from a random number for each: those with the smallest.

    noise: [B, N]; ratio: of masked patches. Returns the visible patches' indices [B, n] and a mask [B, N] bool of the
    masked ones; n = int(N (1 - ratio)), at least 1.
    """
    num_visible = max(1, int(noise.shape[1] * (1 - ratio)))
    visible = noise.argsort(1)[:, :num_visible]
    return visible, torch.ones_like(noise, dtype=torch.bool).scatter_(1, visible, False)


def pixel_loss(prediction: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Return the mean squared error on masked patches, fp32. prediction, targets: [B, N, P]; masked: [B, N] bool."""
    error = (prediction.float() - targets).square().mean(-1)
    return (error * masked).sum() / masked.sum()
