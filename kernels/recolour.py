"""The colours of random views, normalised, cast and laid out in patches: all that follows the crop, in one pass.

    x <- clamp(b x);  x <- clamp(c x + (1 - c) mean(g(x)));  x <- clamp(s x + (1 - s) g(x));  x <- hue(x, h)
    x <- g(x) if grey;  x <- 1 - x where x >= 1/2 if solarize;  out = (x - mean) / std          1/2: 128 of 255 levels

g(x) = .2989 r + .587 g + .114 b. The factors b, c, s, h and the two flags are one row a view; (1, 1, 1, 0, 0, 0) leaves
it as it is. Saturation, hue and grey are for three channels; others keep theirs, and their g is the channels' mean. hue
turns the hue by h of a circle, through HSV, as torchvision does.

out is [N, C, H, W], or with patch = P what `patchify` gives: [N, (H / P) (W / P), C P P], a row in the order of the
flattened kernel of a convolution. Bytes: the views in (twice where the contrast changes: its mean is of the whole view)
and the result out once; the plain sequence moves them some thirty times. No gradient. A blur, which looks at
neighbours, stands between grey and solarize: two calls, the first with the colours, the second with solarize.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dispatch import NAMESPACE, choose, triton_reason
from ._tiles import tile
from ._triton import tl, triton
from .patchify import patchify_reference

BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SOLARIZE, FACTORS = range(7)  # columns of `factors`, and their number
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision and Pillow
THRESHOLD = 128 / 255


def recolour_reference(x: Tensor, factors: Tensor, mean: Tensor, std: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """The specification, in x's precision. Arguments as `recolour`, mean and std as tensors [C]."""
    b, c, s, h, grey, solarize = factors.to(x.dtype)[:, :, None, None, None].unbind(1)
    x = (b * x).clamp(0, 1)
    x = (c * x + (1 - c) * _luma(x).mean((2, 3), keepdim=True)).clamp(0, 1)
    if x.shape[1] == 3:
        x = (s * x + (1 - s) * _luma(x)).clamp(0, 1)
        x = torch.where(h != 0, _turn_hue(x, h[:, 0]), x)
        x = torch.where(grey != 0, _luma(x), x)
    x = torch.where((solarize != 0) & (x >= THRESHOLD), 1 - x, x)
    x = (x - mean.to(x.dtype)[:, None, None]) / std.to(x.dtype)[:, None, None]
    return patchify_reference(x, patch, dtype) if patch else x.to(dtype)


def _luma(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    scale = 1 / chroma.clamp_min(1e-12)  # grey pixels: every difference below is 0
    h = torch.where(r == value, (g - b) * scale, torch.where(g == value, (b - r) * scale + 2, (r - g) * scale + 4))
    channels = []
    for n in (5, 3, 1):  # value - chroma clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6
        k = (h + 6 * shift + n) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma_mean_kernel(x, factors, means, C, pixels, RGB: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """means[n] = mean over the view of g(clamp(b x)); one program a view. Views that keep their contrast get none."""
    n = tl.program_id(0).to(tl.int64)
    b, pixels_read = tl.load(factors + n * 6), tl.where(tl.load(factors + n * 6 + 1) != 1, pixels, 0)
    c, p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK)
    weight = tl.where(c == 0, 0.2989, tl.where(c == 1, 0.587, 0.114)) if RGB else 1.0 / C + 0.0 * c
    total = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for first in tl.range(0, pixels_read, BLOCK):
        at = first + p
        is_here = (c < C)[:, None] & (at < pixels)[None, :]
        total += _clamp(b * tl.load(x + (n * C + c[:, None]) * pixels + at[None, :], mask=is_here, other=0.0))
    tl.store(means + n, tl.sum(tl.sum(total, 1) * weight, 0) / pixels)


@triton.jit
def _hue_channel(h, value, chroma, n):
    k = h + n
    k -= 6 * tl.floor(k / 6)
    return value - chroma * _clamp(tl.minimum(k, 4 - k))


@triton.jit
def _store(out, x, n, c, p, C, H, W, mean, std, is_here, PATCH: tl.constexpr):
    """Channel c of pixels p of view n, normalised and cast, to its place in the picture or in its patch."""
    x = (x - tl.load(mean + c)) / tl.load(std + c)
    if PATCH:
        y, w = p // W, p % W
        row = (n * (H // PATCH) + y // PATCH) * (W // PATCH) + w // PATCH
        at = ((row * C + c) * PATCH + y % PATCH) * PATCH + w % PATCH
    else:
        at = (n * C + c) * H * W + p
    tl.store(out + at, x.to(out.dtype.element_ty), mask=is_here)


@triton.jit
def _recolour_kernel(
    x, factors, means, mean, std, out, C, H, W,
    RGB: tl.constexpr, PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_here = p < H * W
    row = factors + n * 6
    b, contrast, saturation = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    shift, is_grey = tl.load(row + 3), tl.load(row + 4) != 0
    threshold = tl.where(tl.load(row + 5) != 0, 128 / 255, 2.0)  # 2: above all
    level = (1 - contrast) * tl.load(means + n)
    start = x + n * C * H * W + p
    if RGB:
        red = _clamp(contrast * _clamp(b * tl.load(start, mask=is_here, other=0.0)) + level)
        green = _clamp(contrast * _clamp(b * tl.load(start + H * W, mask=is_here, other=0.0)) + level)
        blue = _clamp(contrast * _clamp(b * tl.load(start + 2 * H * W, mask=is_here, other=0.0)) + level)
        luma = (1 - saturation) * (0.2989 * red + 0.587 * green + 0.114 * blue)
        red, green = _clamp(saturation * red + luma), _clamp(saturation * green + luma)
        blue = _clamp(saturation * blue + luma)
        if shift != 0:
            value = tl.maximum(tl.maximum(red, green), blue)
            chroma = value - tl.minimum(tl.minimum(red, green), blue)
            scale = 1 / tl.maximum(chroma, 1e-12)
            last = tl.where(green == value, (blue - red) * scale + 2, (red - green) * scale + 4)
            h = tl.where(red == value, (green - blue) * scale, last) + 6 * shift
            red, green = _hue_channel(h, value, chroma, 5), _hue_channel(h, value, chroma, 3)
            blue = _hue_channel(h, value, chroma, 1)
        luma = 0.2989 * red + 0.587 * green + 0.114 * blue
        red, green = tl.where(is_grey, luma, red), tl.where(is_grey, luma, green)
        blue = tl.where(is_grey, luma, blue)
        red = tl.where(red >= threshold, 1 - red, red)
        green = tl.where(green >= threshold, 1 - green, green)
        blue = tl.where(blue >= threshold, 1 - blue, blue)
        _store(out, red, n, 0, p, C, H, W, mean, std, is_here, PATCH)
        _store(out, green, n, 1, p, C, H, W, mean, std, is_here, PATCH)
        _store(out, blue, n, 2, p, C, H, W, mean, std, is_here, PATCH)
    else:
        for c in tl.range(0, C):
            value = _clamp(contrast * _clamp(b * tl.load(start + c * H * W, mask=is_here, other=0.0)) + level)
            value = tl.where(value >= threshold, 1 - value, value)
            _store(out, value, n, c, p, C, H, W, mean, std, is_here, PATCH)


def _recolour_triton(x: Tensor, factors: Tensor, mean: Tensor, std: Tensor, out: Tensor, patch: int) -> None:
    """Fills `out`, contiguous, from x [N, C, H, W] and factors [N, 6], both fp32 and contiguous."""
    (N, C, H, W), cells = x.shape, tile("recolour", x.device)
    channels, block = 1 << (C - 1).bit_length(), cells["CELLS"]
    means = x.new_empty(N)
    with torch.cuda.device_of(x):
        _luma_mean_kernel[(N,)](
            x, factors, means, C, H * W,
            RGB=C == 3, BLOCK_C=channels, BLOCK=max(block // channels, 16), num_warps=cells["num_warps"],
        )  # fmt: skip
        _recolour_kernel[(N, triton.cdiv(H * W, block))](
            x, factors, means, mean, std, out, C, H, W,
            RGB=C == 3, PATCH=patch, BLOCK=block, num_warps=cells["num_warps"],
        )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::recolour", mutates_args=())
def _op(x: Tensor, factors: Tensor, mean: Tensor, std: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    out = _views(x, factors, mean, std, patch, dtype)
    if x.numel() and choose("recolour", x.device, {"triton": triton_reason(x), "reference": None}) == "triton":
        _recolour_triton(x.contiguous(), factors.contiguous(), mean.contiguous(), std.contiguous(), out, patch)
    elif x.numel():
        out.copy_(recolour_reference(x, factors, mean, std, patch, dtype))
    return out


@_op.register_fake
def _views(x, factors, mean, std, patch, dtype):
    N, C, H, W = x.shape
    shape = (N, (H // patch) * (W // patch), C * patch * patch) if patch else (N, C, H, W)
    return x.new_empty(shape, dtype=dtype)


def recolour(
    x: Tensor,
    factors: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    *,
    patch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views with their colours changed, normalised: [N, C, H, W], or patches [N, (H / P)(W / P), C P P], of `dtype`.

    x: [N, C, H, W] fp32 in 0..1. factors: [N, 6] fp32, of each view the factors of brightness, contrast and
    saturation, the turn of the hue as a part of the circle, and whether it is made grey and solarized (0 or 1).
    mean, std: of each channel. patch: P, the side of a patch; 0: as pictures. Raises ValueError for what does not fit.
    """
    if x.dim() != 4 or x.dtype != torch.float32:
        raise ValueError(f"recolour: x must be fp32 [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if factors.shape != (len(x), FACTORS) or factors.dtype != torch.float32 or factors.device != x.device:
        got = f"{factors.dtype} {list(factors.shape)} on {factors.device}"
        raise ValueError(f"recolour: factors must be fp32 [{len(x)}, {FACTORS}] on {x.device}, got {got}")
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=x.device) for v in (mean, std))
    if mean.shape != x.shape[1:2] or std.shape != x.shape[1:2]:
        raise ValueError(f"recolour: mean and std must have {x.shape[1]} values, got {mean.numel()} and {std.numel()}")
    if patch < 0 or (patch and (x.shape[2] % patch or x.shape[3] % patch)):
        raise ValueError(f"recolour: patch must divide {x.shape[2]} x {x.shape[3]}, got {patch}")
    return _op(x, factors, mean, std, patch, dtype)
