"""Colour changes of a batch, with one factor a sample; the definitions are torchvision's v2 on floats in 0..1.

x: [N, C, H, W] fp32 in 0..1, changed in place and returned. factor: [N]. Saturation, hue and grey mean something for
three channels only and leave other numbers of channels alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # ITU-R 601-2 luma, as torchvision and Pillow


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(factor x)."""
    return x.mul_(_wide(factor)).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(factor x + (1 - factor) m), m the mean of the grey image, one number a sample."""
    means = x.mean((2, 3))
    mean = means @ means.new_tensor(GREY) if x.shape[1] == 3 else means.mean(1)
    return x.mul_(_wide(factor)).add_(_wide((1 - factor) * mean)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """clamp(factor x + (1 - factor) grey(x))."""
    if x.shape[1] != 3:
        return x
    other = grey(x).mul_(_wide(1 - factor))
    return x.mul_(_wide(factor)).add_(other).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` of a full circle, through HSV."""
    if x.shape[1] != 3:
        return x
    value, _ = x.max(1)
    chroma = value - x.amin(1)
    safe = torch.where(chroma == 0, 1.0, chroma)
    r, g, b = ((value - x[:, c]) / safe for c in range(3))
    is_r, is_g = x[:, 0] == value, x[:, 1] == value
    h = torch.where(is_r, b - g, torch.where(is_g, 2 + r - b, 4 + g - r))
    h = (h / 6 + 1 + shift.view(-1, 1, 1)).remainder_(1.0).mul_(6)
    # each channel is value - chroma * clamp(min(k, 4 - k), 0, 1) with k = (n + h) mod 6, n = 5, 3, 1
    for channel, n in enumerate((5, 3, 1)):
        k = (h + n).remainder_(6)
        x[:, channel] = value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)
    return x


def grey(x: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W], a new tensor."""
    y = x[:, 0] * GREY[0]
    return y.add_(x[:, 1], alpha=GREY[1]).add_(x[:, 2], alpha=GREY[2])[:, None]


def solarize(x: Tensor, threshold: float = 128 / 255) -> Tensor:
    """1 - x where x is at least `threshold`."""
    return torch.where(x >= threshold, 1 - x, x)


def blur(x: Tensor, sigma: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Gaussian blur, edges reflected; sigma: [N], pixels; kernel_size: (rows, columns), odd. A new tensor."""
    height, width = x.shape[2:]
    down, along = (_blur_matrices(sigma, n, k) for n, k in ((height, kernel_size[0]), (width, kernel_size[1])))
    return (down[:, None] @ x) @ along[:, None].transpose(-1, -2)


def blur_kernel_size(size: int) -> int:
    """A tenth of the side, odd, at least 3: SimCLR's rule."""
    return max(3, math.floor(size / 20) * 2 + 1)


def _blur_matrices(sigma: Tensor, size: int, kernel_size: int) -> Tensor:
    """[N, size, size] whose rows hold the kernel, its parts beyond an edge folded back."""
    half = min(kernel_size // 2, size - 1)
    offsets = torch.arange(-half, half + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    columns = torch.arange(size, device=sigma.device)[:, None] + offsets
    columns = torch.where(columns < 0, -columns, columns)
    columns = torch.where(columns >= size, 2 * (size - 1) - columns, columns)
    matrices = sigma.new_zeros(len(sigma), size, size)
    return matrices.scatter_add_(2, columns.expand(len(sigma), -1, -1), weights[:, None].expand(-1, size, -1))


def _wide(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)
