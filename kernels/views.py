"""Crops of uint8 images of any sizes, resized with antialiasing, mirrored, turned: the geometry of random views.

    out[n, c] = T(W_y x W_x^T) / 255       x: the crop of image i(n), channel c
    W[j, k] = f((k + 1/2 - m_j) / max(s, 1)) / sum,   m_j = s (j + 1/2),   s = length / size

f is a triangle (bilinear) or Keys' cubic with a = -1/2 (bicubic; values are clamped between the passes, as on uint8),
taken over the pixels inside the crop: torch.nn.functional.interpolate(antialias=True), and Pillow. T mirrors and
transposes.

Shapes: N views of B images, C channels, H x W pixels out. The images lie one behind the other in `pixels`, each in its
own memory order, so a batch goes to the device in one copy. Bytes: the crops in once from memory, the views out once;
the plain sequence pads every image to the largest and multiplies it by two mostly empty matrices. No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._dispatch import NAMESPACE, choose, triton_reason
from ._tiles import tile
from ._triton import tl, triton

INTERPOLATIONS = ("bilinear", "bicubic")
FLIP_Y, FLIP_X, TRANSPOSE = 1, 2, 4  # bits of a view's turn
PLACE, BOX = 4, 6  # numbers that describe an image, a view


def crop_resize_reference(
    pixels: Tensor, places: Tensor, boxes: Tensor, channels: int, height: int, width: int, interpolation: str
) -> Tensor:
    """The specification: two products a view. Arguments as `crop_resize`; fp32, or fp64 under a default of fp64."""
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
    """Matrices that crop [start, start + length) out of `total` pixels and resize it to `size`.

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
def _crop_resize_kernel(
    pixels, places, boxes, out, C, H, W,
    CUBIC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    image, turn = tl.load(boxes + n * 6), tl.load(boxes + n * 6 + 5)
    top, left = tl.load(boxes + n * 6 + 1), tl.load(boxes + n * 6 + 2)
    rows, columns = tl.load(boxes + n * 6 + 3), tl.load(boxes + n * 6 + 4)
    place = places + image.to(tl.int64) * 4
    base, stride_c = tl.load(place), tl.load(place + 1)
    stride_y, stride_x = tl.load(place + 2), tl.load(place + 3)

    # where in the upright, unmirrored view this pixel comes from
    out_y, out_x = p // W, p % W
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
    is_here = (c < C)[:, None] & (p < H * W)[None, :]
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
    total = tl.minimum(tl.maximum(total / weight_y[None, :], 0.0), 255.0) / 255
    tl.store(out + (n * C + c[:, None]) * H * W + p[None, :], total, mask=is_here)


def _crop_resize_triton(pixels: Tensor, places: Tensor, boxes: Tensor, out: Tensor, interpolation: str) -> None:
    """Fills `out` [N, C, H, W], contiguous."""
    (N, C, H, W), cells = out.shape, tile("crop_resize", out.device)
    channels = 1 << (C - 1).bit_length()
    block = max(cells["CELLS"] // channels, 16)
    with torch.cuda.device_of(out):
        _crop_resize_kernel[(N, triton.cdiv(H * W, block))](
            pixels, places, boxes, out, C, H, W,
            CUBIC=interpolation == "bicubic", BLOCK_C=channels, BLOCK=block, num_warps=cells["num_warps"],
        )  # fmt: skip


@torch.library.custom_op(f"{NAMESPACE}::crop_resize", mutates_args=())
def _op(
    pixels: Tensor, places: Tensor, boxes: Tensor, channels: int, height: int, width: int, interpolation: str
) -> Tensor:
    out = _views(pixels, places, boxes, channels, height, width, interpolation)
    if (
        len(boxes)
        and choose("crop_resize", pixels.device, {"triton": triton_reason(pixels), "reference": None}) == "triton"
    ):
        _crop_resize_triton(pixels, places.contiguous(), boxes.contiguous(), out, interpolation)
    elif len(boxes):
        out.copy_(crop_resize_reference(pixels, places, boxes, channels, height, width, interpolation))
    return out


@_op.register_fake
def _views(pixels, places, boxes, channels, height, width, interpolation):
    return pixels.new_empty(len(boxes), channels, height, width, dtype=torch.float32)


def crop_resize(
    pixels: Tensor,
    places: Tensor,
    boxes: Tensor,
    channels: int,
    height: int,
    width: int,
    interpolation: str = "bilinear",
) -> Tensor:
    """Views of packed images: [N, channels, height, width], fp32 in 0..1.

    pixels: uint8, one dimension, all images behind one another. places: [B, 4] int64, of each image the offset of its
    first pixel and its strides over channels, rows and columns. boxes: [N, 6] int32, of each view the image, top, left,
    height and width of the crop in pixels, and its turn: the sum of FLIP_Y and FLIP_X (mirrored up-down, left-right)
    and TRANSPOSE (then transposed; square views only). Boxes must lie inside their images: this is not checked, it
    would wait for the device. Raises ValueError for shapes and types that do not fit.
    """
    if pixels.dtype != torch.uint8 or pixels.dim() != 1 or not pixels.is_contiguous():
        raise ValueError(f"crop_resize: pixels must be uint8 [bytes], got {pixels.dtype} {list(pixels.shape)}")
    for name, x, dtype, columns in (("places", places, torch.int64, PLACE), ("boxes", boxes, torch.int32, BOX)):
        if x.dtype != dtype or x.dim() != 2 or x.shape[1] != columns or x.device != pixels.device:
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"crop_resize: {name} must be {dtype} [., {columns}] on {pixels.device}, got {got}")
    if min(channels, height, width) < 1:
        raise ValueError(f"crop_resize: channels and size must be at least 1, got {channels}, {height} x {width}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"crop_resize: interpolation must be {' or '.join(INTERPOLATIONS)}, got {interpolation!r}")
    return _op(pixels, places, boxes, channels, height, width, interpolation)
