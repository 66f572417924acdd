"""Triton form of random views, in one launch: a program makes a view from crop to patches. Formulas: op.py.

    1  crop, resize        -> room        and the sum for the contrast's mean
    2  colors up to gray   -> out         solarized, normalized, cast; blurred views: -> room, then
    3  blur along rows     -> scratch
    4  blur along columns  -> out         solarized, normalized, cast

`room` is the result's own memory: a view waits there, in 16 bits as fixed point (1/65535), until its mean is known.
Programs share nothing, so none waits for another: the step's kernels run beside this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._tile_sizes import tile
from .._triton import on_device_of, tl, triton
from .eager import halves


@triton.jit
def _clamp(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _store(at, x, mask, FIXED: tl.constexpr):
    """Store x in 0..1 for later."""
    x = (x * 65535 + 0.5).to(tl.int32) - 32768 if FIXED else x
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _load(at, mask, FIXED: tl.constexpr):
    x = tl.load(at, mask=mask, other=0).to(tl.float32)
    return (x + 32768) / 65535 if FIXED else x


@triton.jit
def _cell(y, x, C, W, PATCH: tl.constexpr):
    """Compute the index of pixel (y, x) of the first channel in a view of the result; channels are a plane apart."""
    if PATCH:
        row = (y // PATCH) * (W // PATCH) + x // PATCH
        return (row * C * PATCH + y % PATCH) * PATCH + x % PATCH
    else:
        return y * W + x


@triton.jit
def _pixel(p, W, PATCH: tl.constexpr):
    """Compute row and column of the p-th pixel in the order of the result."""
    if PATCH:
        patch, inside = p // (PATCH * PATCH), p % (PATCH * PATCH)
        across = W // PATCH
        return (patch // across) * PATCH + inside // PATCH, (patch % across) * PATCH + inside % PATCH
    else:
        return p // W, p % W


@triton.jit
def _filter(t, CUBIC: tl.constexpr):
    t = tl.abs(t)
    if CUBIC:
        near = (1.5 * t - 2.5) * t * t + 1
        far = (((t - 5) * t + 8) * t - 4) * -0.5
        return tl.where(t < 1, near, tl.where(t < 2, far, 0.0))
    else:
        return tl.maximum(1 - t, 0.0)


@triton.jit
def _resized(
    pixels, place, box, out_y, out_x, is_here, C, H, W,
    CUBIC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Resize pixels (out_y, out_x) of the view of a box, over all channels: [BLOCK_C, BLOCK] in 0..1."""
    # lizard forgives: long, as the crop's geometry stays in the registers of one program
    c = tl.arange(0, BLOCK_C)
    top, left, rows, columns = tl.load(box + 1), tl.load(box + 2), tl.load(box + 3), tl.load(box + 4)
    turn = tl.load(box + 5)
    base, stride_c = tl.load(place), tl.load(place + 1)
    stride_y, stride_x = tl.load(place + 2), tl.load(place + 3)

    # where in the upright, unmirrored view this pixel comes from
    y, x = tl.where((turn & 4) != 0, out_x, out_y), tl.where((turn & 4) != 0, out_y, out_x)
    y, x = tl.where((turn & 1) != 0, H - 1 - y, y), tl.where((turn & 2) != 0, W - 1 - x, x)

    scale_y, scale_x = rows.to(tl.float32) / H, columns.to(tl.float32) / W
    wide_y, wide_x = tl.maximum(scale_y, 1.0), tl.maximum(scale_x, 1.0)
    radius = 2.0 if CUBIC else 1.0
    center_y, center_x = scale_y * (y + 0.5), scale_x * (x + 0.5)
    first_y = tl.maximum((center_y - radius * wide_y + 0.5).to(tl.int32), 0)
    first_x = tl.maximum((center_x - radius * wide_x + 0.5).to(tl.int32), 0)
    taps_y, taps_x = (2 * radius * wide_y).to(tl.int32) + 2, (2 * radius * wide_x).to(tl.int32) + 2

    start = pixels + base + top * stride_y + left * stride_x + c[:, None] * stride_c
    is_here = (c < C)[:, None] & is_here[None, :]
    total = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    weight_y = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, taps_y):
        source_y = first_y + i
        w_y = tl.where(source_y < rows, _filter((source_y + 0.5 - center_y) / wide_y, CUBIC), 0.0)
        row = tl.zeros((BLOCK_C, BLOCK), tl.float32)
        weight_x = tl.zeros((BLOCK,), tl.float32)
        for j in tl.range(0, taps_x):
            source_x = first_x + j
            is_inside = (source_x < columns) & (source_y < rows)
            w_x = tl.where(source_x < columns, _filter((source_x + 0.5 - center_x) / wide_x, CUBIC), 0.0)
            at = start + (source_y * stride_y + source_x * stride_x)[None, :]
            row += w_x[None, :] * tl.load(at, mask=is_here & is_inside[None, :], other=0).to(tl.float32)
            weight_x += w_x
        row = row / weight_x[None, :]
        if CUBIC:
            row = tl.minimum(tl.maximum(row, 0.0), 255.0)
        total += w_y[None, :] * row
        weight_y += w_y
    # beyond the last channel and the last pixel there is nothing: 0 there, not 0 / 0
    return tl.where(is_here, _clamp(total / weight_y[None, :] / 255), 0.0)


@triton.jit
def _hue_channel(h, value, chroma, n):
    k = h + n
    k -= 6 * tl.floor(k / 6)
    return value - chroma * _clamp(tl.minimum(k, 4 - k))


@triton.jit
def _colored(red, green, blue, row):
    """Apply saturation, hue and gray of a row of `factors`."""
    saturation, shift, is_gray = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4) != 0
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
    return tl.where(is_gray, luma, red), tl.where(is_gray, luma, green), tl.where(is_gray, luma, blue)


@triton.jit
def _finish(out, x, c, row, mean, std, mask):
    """Solarize, normalize and cast x, and store it in the result."""
    threshold = tl.where(tl.load(row + 6) != 0, 128 / 255, 2.0)  # 2: above all
    x = tl.where(x >= threshold, 1 - x, x)
    x = (x - tl.load(mean + c)) / tl.load(std + c)
    tl.store(out, x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_color(out, room, x, c, row, mean, std, mask, is_blurred, FIXED: tl.constexpr):
    """Store a colored pixel in the result, or in `room` for the blur."""
    if is_blurred:
        _store(room, x, mask, FIXED)
    else:
        _finish(out, x, c, row, mean, std, mask)


@triton.jit
def _reflected(i, size):
    i = tl.abs(i)
    return tl.where(i < size, i, 2 * (size - 1) - i)


@triton.jit
def _views_kernel(
    pixels, places, boxes, factors, mean, std, out, room, scratch, C, H, W, half_y, half_x,
    RGB: tl.constexpr, CUBIC: tl.constexpr, PATCH: tl.constexpr, BLUR: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make one view."""
    # lizard forgives: long, as one program makes a whole view, with its mean in registers between the passes
    n = tl.program_id(0).to(tl.int64)
    size = H * W
    plane = PATCH * PATCH if PATCH else size  # from a channel to the next, in the result
    row, box = factors + n * 7, boxes + n * 6
    place = places + tl.load(box).to(tl.int64) * 4
    out += n * C * size
    room += n * C * size
    b, contrast = tl.load(row), tl.load(row + 1)
    is_blurred = tl.load(row + 5) > 0 if BLUR else False

    c = tl.arange(0, BLOCK_C)
    weight = tl.where(c == 0, 0.2989, tl.where(c == 1, 0.587, 0.114)) if RGB else 1.0 / C + 0.0 * c
    total = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for first in tl.range(0, size, BLOCK):
        p = first + tl.arange(0, BLOCK)
        y, x = _pixel(p, W, PATCH)
        value = _resized(pixels, place, box, y, x, p < size, C, H, W, CUBIC, BLOCK_C, BLOCK)
        total += _clamp(b * value)
        at = room + _cell(y, x, C, W, PATCH)[None, :] + c[:, None] * plane
        _store(at, value, (c < C)[:, None] & (p < size)[None, :], FIXED)
    level = (1 - contrast) * tl.sum(tl.sum(total, 1) * weight, 0) / size
    tl.debug_barrier()  # what follows reads what other threads have stored

    for first in tl.range(0, size, BLOCK):
        p = first + tl.arange(0, BLOCK)
        mask = p < size
        y, x = _pixel(p, W, PATCH)
        cell = _cell(y, x, C, W, PATCH)
        if RGB:
            red = _clamp(contrast * _clamp(b * _load(room + cell, mask, FIXED)) + level)
            green = _clamp(contrast * _clamp(b * _load(room + plane + cell, mask, FIXED)) + level)
            blue = _clamp(contrast * _clamp(b * _load(room + 2 * plane + cell, mask, FIXED)) + level)
            red, green, blue = _colored(red, green, blue, row)
            _store_color(out + cell, room + cell, red, 0, row, mean, std, mask, is_blurred, FIXED)
            cell += plane
            _store_color(out + cell, room + cell, green, 1, row, mean, std, mask, is_blurred, FIXED)
            cell += plane
            _store_color(out + cell, room + cell, blue, 2, row, mean, std, mask, is_blurred, FIXED)
        else:
            for k in tl.range(0, C):
                value = _clamp(contrast * _clamp(b * _load(room + cell, mask, FIXED)) + level)
                _store_color(out + cell, room + cell, value, k, row, mean, std, mask, is_blurred, FIXED)
                cell += plane

    if is_blurred:
        scratch += n * C * size
        falloff = -0.5 / (tl.load(row + 5) * tl.load(row + 5))
        tl.debug_barrier()
        for first in tl.range(0, C * size, BLOCK):
            p = first + tl.arange(0, BLOCK)
            mask, k, y, x = p < C * size, p // size, p % size // W, p % W
            value, weights = tl.zeros((BLOCK,), tl.float32), 0.0
            for i in tl.range(-half_x, half_x + 1):
                w = tl.exp(falloff * (i * i))
                at = room + k * plane + _cell(y, _reflected(x + i, W), C, W, PATCH)
                value += w * _load(at, mask, FIXED)
                weights += w
            _store(scratch + p, value / weights, mask, FIXED)
        tl.debug_barrier()
        for first in tl.range(0, C * size, BLOCK):
            p = first + tl.arange(0, BLOCK)
            mask, k, y, x = p < C * size, p // size, p % size // W, p % W
            value, weights = tl.zeros((BLOCK,), tl.float32), 0.0
            for i in tl.range(-half_y, half_y + 1):
                w = tl.exp(falloff * (i * i))
                value += w * _load(scratch + k * size + _reflected(y + i, H) * W + x, mask, FIXED)
                weights += w
            at = out + k * plane + _cell(y, x, C, W, PATCH)
            # k may lie beyond the last channel only where the mask is off
            _finish(at, value / weights, tl.minimum(k, C - 1), row, mean, std, mask)


def views_triton(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor, out: Tensor,
    height: int, width: int, interpolation: str, taps: tuple[int, int], patch: int,
) -> None:  # fmt: skip
    """Fill `out`; arguments as `make_views`, all contiguous."""
    N, channels, cells, is_fixed = len(out), len(mean), tile("views", out.device), out.element_size() == 2
    block_c, has_blur = 1 << (channels - 1).bit_length(), max(taps) > 1
    room = out.view(torch.int16) if is_fixed else out
    scratch = torch.empty_like(room) if has_blur else room
    with on_device_of(out):
        _views_kernel[(N,)](
            pixels, places, boxes, factors, mean, std, out, room, scratch, channels, height, width,
            *halves(taps, height, width),
            RGB=channels == 3, CUBIC=interpolation == "bicubic", PATCH=patch, BLUR=has_blur, FIXED=is_fixed,
            BLOCK_C=block_c, BLOCK=max(cells["CELLS"] // block_c, 16), num_warps=cells["num_warps"],
            enable_fp_fusion=True,
        )  # fmt: skip
