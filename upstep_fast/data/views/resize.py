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
    new = _eval_size(image.shape[1], image.shape[2], size, crop_pct, crop_mode)
    return center_crop(resize(image, new, interpolation), size)


def eval_resize_labels(
    labels: Tensor, size: tuple[int, int], crop_pct: float, crop_mode: str = "center", fill: int = 255
) -> Tensor:
    """Resize and crop labels of pixels as `eval_resize` does an image, without mixing them: uint8 [H, W] -> [*size].

    fill: label of what lies beyond the image.
    """
    new = _eval_size(labels.shape[0], labels.shape[1], size, crop_pct, crop_mode)
    nearest = F.interpolate(labels[None, None], size=new, mode="nearest-exact")
    return center_crop(nearest[0], size, fill)[0]


def _eval_size(height: int, width: int, size: tuple[int, int], crop_pct: float, crop_mode: str) -> tuple[int, int]:
    """Return the height and width that timm resizes to before its crop."""
    target = (math.floor(size[0] / crop_pct), math.floor(size[1] / crop_pct))
    if crop_mode == "squash":
        return target
    if target[0] == target[1]:
        short, long = sorted((height, width))
        scaled = int(target[0] * long / short)
        return (scaled, target[0]) if height > width else (target[0], scaled)
    ratio = min(height / target[0], width / target[1])  # timm.data.transforms.ResizeKeepRatio
    return (round(height / ratio), round(width / ratio))


def center_crop(image: Tensor, size: tuple[int, int], fill: int = 0) -> Tensor:
    """Crop the middle of [C, H, W] as torchvision does, padded with `fill` where the image is smaller."""
    height, width = image.shape[1:]
    if height < size[0] or width < size[1]:
        top, left = (max(0, (s - length) // 2) for s, length in zip(size, (height, width), strict=True))
        bottom, right = (max(0, (s - length + 1) // 2) for s, length in zip(size, (height, width), strict=True))
        image = F.pad(image, (left, right, top, bottom), value=fill)
        height, width = image.shape[1:]
    top, left = (round((length - s) / 2.0) for s, length in zip(size, (height, width), strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | None = None
) -> Tensor:
    """Return (images - mean) / std of every channel, fp32 [..., C, H, W] on `device` (None: where the images are).

    images: uint8, or floats on a 0..1 scale. They are copied as they are, to a GPU from pinned memory.
    """
    if device is not None and device != images.device:
        images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = images.float().div_(255)
    mean_C11, std_C11 = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (mean, std))
    return (images - mean_C11).div_(std_C11)


def check_interpolation(name: str) -> None:
    """Raise ValueError for an interpolation that is not offered."""
    if name not in INTERPOLATIONS:
        raise ValueError(f"interpolation: got {name!r}, must be {' or '.join(INTERPOLATIONS)}")
