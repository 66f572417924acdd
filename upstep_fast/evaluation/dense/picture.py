"""Pictures of patch tokens: their first three principal components as red, green and blue.

    X = all tokens of all models, centered;   V = its first three principal directions, the largest loading positive
    color = (X V - q1) / (q99 - q1), clipped to 0..1       q1, q99: percentiles 1 and 99 of each component

One projection for all models, so equal colors are equal tokens; upsampled bilinearly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_colors(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return colors in 0..1, [N, 3, h, w] fp32, of each model's tokens [N, h, w, D]."""
    rows = torch.cat([x.flatten(0, 2) for x in tokens]).double()
    mean = rows.mean(0)
    _, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))  # ascending
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = (rows - mean) @ axes
    low, high = (values.quantile(q, dim=0) for q in (0.01, 0.99))
    scale = (high - low).clamp_min(1e-12)
    colors = [(((x.double() - mean) @ axes - low) / scale).clamp(0, 1).float() for x in tokens]
    return [F.pad(x, (0, 3 - x.shape[-1])).permute(0, 3, 1, 2) for x in colors]


def upsampled(colors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return colors [N, 3, h, w] in 0..1 as pictures, uint8 [N, 3, *size]."""
    x = F.interpolate(colors, size, mode="bilinear", align_corners=False)
    return (255 * x).round().byte()
