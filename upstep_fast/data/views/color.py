"""Color changes of a batch with one factor per sample, as torchvision's v2 defines them on floats in 0..1.

x: [N, C, H, W] fp32 in 0..1, changed in place and returned. factor: [N]. Saturation, hue and gray need three channels
and do not change images with other numbers of channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from upstep_fast.kernels.views.eager import blur as blur

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision and Pillow


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Compute clamp(factor x)."""
    return x.mul_(_per_sample(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Compute clamp(factor x + (1 - factor) m), m the mean of the gray image, one number per sample."""
    means = x.mean((2, 3))
    mean = means @ means.new_tensor(GRAY) if x.shape[1] == 3 else means.mean(1)
    return x.mul_(_per_sample(factor)).add_(_per_sample((1 - factor) * mean)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Compute clamp(factor x + (1 - factor) gray(x))."""
    if x.shape[1] != 3:
        return x
    other = gray(x).mul_(_per_sample(1 - factor))
    return x.mul_(_per_sample(factor)).add_(other).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue by `shift` [N], a fraction of the full circle, in HSV."""
    if x.shape[1] != 3:
        return x
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    scale = 1 / chroma.clamp_min(1e-12)  # gray pixels: every difference below is 0
    h = torch.where(r == value, (g - b) * scale, torch.where(g == value, (b - r) * scale + 2, (r - g) * scale + 4))
    h += 6 * shift.view(-1, 1, 1)
    # each channel is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + h) mod 6, n = 5, 3, 1
    for channel, n in enumerate((5, 3, 1)):
        k = h + n
        k.sub_((k / 6).floor_(), alpha=6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, chroma, k, value=-1, out=x[:, channel])
    return x


def gray(x: Tensor) -> Tensor:
    """Return the luma of RGB images: [N, 3, H, W] -> [N, 1, H, W], a new tensor."""
    y = x[:, 0] * GRAY[0]
    return y.add_(x[:, 1], alpha=GRAY[1]).add_(x[:, 2], alpha=GRAY[2])[:, None]


def solarize(x: Tensor, threshold: float = 128 / 255) -> Tensor:
    """Return 1 - x where x is at least `threshold`, else x: a new tensor."""
    return torch.where(x >= threshold, 1 - x, x)


def blur_kernel_size(size: int) -> int:
    """Return SimCLR's kernel size: a tenth of the side, odd, at least 3 pixels."""
    return max(3, math.floor(size / 20) * 2 + 1)


def _per_sample(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
