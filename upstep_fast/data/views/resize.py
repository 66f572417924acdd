"""Antialiased resizing of one image on the CPU, and timm's evaluation transform."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels.views import INTERPOLATIONS


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize an image, antialiased: uint8 [C, H, W] -> uint8 [C, *size]. Raises ValueError for `interpolation`."""
    check_interpolation(interpolation)
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode=interpolation, antialias=True, align_corners=False)[0]


def eval_resize(
    image: Tensor, size: tuple[int, int], interpolation: str, crop_pct: float, crop_mode: str = "center"
) -> Tensor:
    """Apply timm's evaluation transform: resize to size / crop_pct, center crop. uint8 [C, H, W] -> [C, *size].

    crop_mode: "center" keeps the aspect ratio, the short side becomes size / crop_pct; "squash" does not keep it.
    """
    height, width = image.shape[1:]
    target = (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct))
    if crop_mode == "squash":
        new = target
    elif target[0] == target[1]:
        short, long = sorted((height, width))
        scaled = int(target[0] * long / short)
        new = (scaled, target[0]) if height > width else (target[0], scaled)
    else:  # timm.data.transforms.ResizeKeepRatio
        ratio = min(height / target[0], width / target[1])
        new = (round(height / ratio), round(width / ratio))
    return center_crop(resize(image, new, interpolation), size)


def center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop the middle of [C, H, W] as torchvision does, padded with 0 where the image is smaller."""
    height, width = image.shape[1:]
    if height < size[0] or width < size[1]:
        top, left = (max(0, (s - length) // 2) for s, length in zip(size, (height, width), strict=True))
        bottom, right = (max(0, (s - length + 1) // 2) for s, length in zip(size, (height, width), strict=True))
        image = F.pad(image, (left, right, top, bottom))
        height, width = image.shape[1:]
    top, left = (round((length - s) / 2.0) for s, length in zip(size, (height, width), strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (images - mean) / std of every channel; images: [..., C, H, W] on a 0..1 scale, on any device."""
    mean_C11, std_C11 = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images - mean_C11) / std_C11


def check_interpolation(name: str) -> None:
    """Raise ValueError for an interpolation that is not offered."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {name!r}, must be {' or '.join(INTERPOLATIONS)}")
