"""Antialiased resizing, and timm's evaluation transform.

The filter is that of torch.nn.functional.interpolate(antialias=True) and of Pillow: triangle or cubic (a = -0.5),
widened by the scale when shrinking, normalised over the taps inside the image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

INTERPOLATIONS = ("bilinear", "bicubic")


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 [C, H, W] -> uint8 [C, *size]."""
    check_interpolation(interpolation)
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode=interpolation, antialias=True, align_corners=False)[0]


def eval_resize(image: Tensor, size: tuple[int, int], interpolation: str, crop_pct: float) -> Tensor:
    """What timm's evaluation transform does: the short side to size / crop_pct, then the centre. uint8 in and out."""
    height, width = image.shape[1:]
    target = tuple(math.floor(s / crop_pct) for s in size)
    if target[0] == target[1]:
        short, long = sorted((height, width))
        scaled = int(target[0] * long / short)
        new = (scaled, target[0]) if height > width else (target[0], scaled)
    else:  # timm.data.transforms.ResizeKeepRatio
        ratio = min(height / target[0], width / target[1])
        new = (round(height / ratio), round(width / ratio))
    return center_crop(resize(image, new, interpolation), size)


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's: the middle of [C, H, W], padded with 0 where the image is smaller."""
    height, width = image.shape[1:]
    if height < size[0] or width < size[1]:
        top, left = (max(0, (s - have) // 2) for s, have in zip(size, (height, width), strict=True))
        bottom, right = (max(0, (s - have + 1) // 2) for s, have in zip(size, (height, width), strict=True))
        image = F.pad(image, (left, right, top, bottom))
        height, width = image.shape[1:]
    top, left = (round((have - s) / 2.0) for s, have in zip(size, (height, width), strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def check_interpolation(name: str) -> None:
    """Raises ValueError for an interpolation that is not offered."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {name!r}, must be {' or '.join(INTERPOLATIONS)}")


def resize_weights(
    start: Tensor, length: Tensor, total: int, size: int, interpolation: str, flip: Tensor | None = None
) -> Tensor:
    """Matrices that crop [start, start + length) out of `total` pixels and resize it to `size`.

    start, length: [N] fp32, pixels. flip: [N] bool, which of them to mirror. Returns [N, size, total] fp32; rows sum
    to 1, columns outside the crop are 0.
    Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_indices_weights_aa.
    """
    scale = length / size
    stretch = scale.clamp_min(1.0)  # the filter widens only when shrinking
    place = torch.arange(size, device=start.device) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None], size - place, place)
    center = scale[:, None] * place + start[:, None]
    pixel = torch.arange(total, device=start.device) + 0.5
    t = ((pixel - center[..., None]) / stretch[:, None, None]).abs_()
    weights = (1.0 - t).clamp_min_(0.0) if interpolation == "bilinear" else _cubic(t)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None, :]
    return weights.div_(weights.sum(-1, keepdim=True))


def _cubic(t: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * a
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))
