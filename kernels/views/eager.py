"""Eager form of random views, part by part: the specification of op.py; the CPU's loader uses some parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..patchify import patchify_reference

FLIP_Y, FLIP_X, TRANSPOSE = 1, 2, 4  # bits of a view's orientation
# columns of `factors`, in the order in which they are applied, and their number
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SIGMA, SOLARIZE, FACTORS = range(8)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision and Pillow
THRESHOLD = 128 / 255  # of solarize


def views_reference(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor,
    height: int, width: int, interpolation: str, taps: tuple[int, int], patch: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Compute the specification of `make_views` (its arguments) in fp32, or in fp64 under a default of fp64."""
    x = crop_resize(pixels, places, boxes, len(mean), height, width, interpolation)
    x = recolor(x, factors)
    sigma = factors[:, SIGMA].to(x.dtype)
    if (sigma > 0).any():
        x[sigma > 0] = blur(x[sigma > 0], sigma[sigma > 0], taps)
    return finish(x, factors, mean, std, patch, dtype)


def crop_resize(
    pixels: Tensor, places: Tensor, boxes: Tensor, channels: int, height: int, width: int, interpolation: str
) -> Tensor:
    """Crop and resize by two products a view; returns [N, channels, height, width] in 0..1, fp32 or default fp64."""
    out = []
    for image, top, left, rows, columns, turn in boxes.tolist():
        offset, *strides = places[image].tolist()
        crop = pixels.as_strided((channels, rows, columns), strides, offset + top * strides[1] + left * strides[2])
        start, length = pixels.new_zeros(1).float(), pixels.new_ones(1).float()
        down = resize_weights(start, length * rows, rows, height, interpolation)[0].to(torch.get_default_dtype())
        along = resize_weights(start, length * columns, columns, width, interpolation)[0].to(down.dtype)
        x = crop.to(down.dtype) @ along.T
        x = down @ (x.clamp(0, 255) if interpolation == "bicubic" else x)
        flips = [axis for axis, bit in ((1, FLIP_Y), (2, FLIP_X)) if turn & bit]
        x = x.flip(flips).clamp(0, 255) / 255
        out.append(x.transpose(1, 2) if turn & TRANSPOSE else x)
    return torch.stack(out)


def resize_weights(
    start: Tensor, length: Tensor, total: int, size: int, interpolation: str, flip: Tensor | None = None
) -> Tensor:
    """Return matrices that crop [start, start + length) out of `total` pixels and resize it to `size`.

    start, length: [N] fp32, pixels. flip: [N] bool, which of them to mirror. Returns [N, size, total] fp32; rows sum
    to 1, columns outside the crop are 0.
    Source: aten/src/ATen/native/cpu/UpSampleKernel.cpp, compute_indices_weights_aa.
    """
    scale = length / size
    stretch = scale.clamp_min(1.0)  # the filter widens only when shrinking
    place = torch.arange(size, device=start.device, dtype=torch.float32) + 0.5
    if flip is not None:
        place = torch.where(flip[:, None], size - place, place)
    center = scale[:, None] * place + start[:, None]
    pixel = torch.arange(total, device=start.device, dtype=torch.float32) + 0.5
    t = ((pixel - center[..., None]) / stretch[:, None, None]).abs_()
    weights = (1.0 - t).clamp_min_(0.0) if interpolation == "bilinear" else _cubic(t)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None, :]
    return weights.div_(weights.sum(-1, keepdim=True))


def _cubic(t: Tensor, a: float = -0.5) -> Tensor:
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = (((t - 5) * t + 8) * t - 4) * a
    return torch.where(t < 1, near, torch.where(t < 2, far, 0.0))


def recolor(x: Tensor, factors: Tensor) -> Tensor:
    """Apply torchvision's brightness, contrast, saturation, hue and gray to views [N, C, H, W] in 0..1.

    The last three are for three channels; other images keep their colors, and their luma is the channels' mean.
    """
    b, c, s, h, gray = factors.to(x.dtype)[:, : GRAY + 1, None, None, None].unbind(1)
    x = (b * x).clamp(0, 1)
    x = (c * x + (1 - c) * _luma(x).mean((2, 3), keepdim=True)).clamp(0, 1)
    if x.shape[1] == 3:
        x = (s * x + (1 - s) * _luma(x)).clamp(0, 1)
        x = torch.where(h != 0, _turn_hue(x, h[:, 0]), x)
        x = torch.where(gray != 0, _luma(x), x)
    return x


def finish(x: Tensor, factors: Tensor, mean: Tensor, std: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Solarize, normalize and cast views; patch > 0: also cut them to patches."""
    x = torch.where((factors[:, SOLARIZE, None, None, None] != 0) & (x >= THRESHOLD), 1 - x, x)
    x = (x - mean.to(x.dtype)[:, None, None]) / std.to(x.dtype)[:, None, None]
    return patchify_reference(x, patch, dtype) if patch else x.to(dtype)


def blur(x: Tensor, sigma: Tensor, taps: tuple[int, int]) -> Tensor:
    """Return x blurred by a Gaussian, edges reflected; sigma: [N], pixels; taps: of rows and columns, odd."""
    count, channels, height, width = x.shape
    y = x.reshape(1, count * channels, height, width)  # a group a plane, each with its own kernel
    for axis, half in enumerate(halves(taps, height, width)):
        offsets = torch.arange(-half, half + 1, device=x.device)
        kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
        kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
        around = (0, 0, half, half) if axis == 0 else (half, half, 0, 0)
        shape = (-1, 1, 2 * half + 1, 1) if axis == 0 else (-1, 1, 1, 2 * half + 1)
        y = F.conv2d(F.pad(y, around, mode="reflect"), kernel.view(shape), groups=count * channels)
    return y.view_as(x)


def halves(taps: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return the radius of a blur in rows and columns: a view is reflected once at most."""
    return min(taps[0] // 2, height - 1), min(taps[1] // 2, width - 1)


def _luma(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = 1 / chroma.clamp_min(1e-12)  # gray pixels: every difference below is 0
    h = torch.where(r == value, (g - b) * scale, torch.where(g == value, (b - r) * scale + 2, (r - g) * scale + 4))
    channels = []
    for n in (5, 3, 1):  # value - chroma clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6
        k = (h + 6 * shift + n) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)
