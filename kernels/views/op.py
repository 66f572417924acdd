"""Random views of uint8 images of any sizes: crop, resize, flips, colors, blur, normalize, cast, patches.

    x = T(W_y x_0 W_x^T) / 255      x_0: the crop of image i(n), a channel
        W[j, k] = f((k + 1/2 - m_j) / max(s, 1)) / sum,   m_j = s (j + 1/2),   s = length / size
    x <- clamp(b x);  x <- clamp(c x + (1 - c) mean(g(x)));  x <- clamp(s x + (1 - s) g(x));  x <- hue(x, h)
    x <- g(x) if gray;  x <- G_sigma * x if sigma > 0;  x <- 1 - x where x >= 128 / 255 if solarize
    out = (x - mean) / std

f is a triangle (bilinear) or Keys' cubic with a = -1/2 (bicubic; values are clamped between the passes, as on uint8),
taken over the pixels inside the crop: torch.nn.functional.interpolate(antialias=True), and Pillow. T mirrors and
transposes. g(x) = .2989 r + .587 g + .114 b, its mean is of the whole view; hue turns the hue by h of a circle, through
HSV; G is a Gaussian with reflected edges: torchvision's. Saturation, hue and gray are for three channels.

Shapes: N views of B images, C channels, H x W pixels. The images lie one behind the other in `pixels`, each in its own
memory order, so a batch goes to the device in one copy. out is [N, C, H, W], or with patch = P what `patchify` gives:
[N, (H / P) (W / P), C P P], a row in the order of the flattened kernel of a convolution.

On a GPU (triton.py) the contrast needs the mean of the finished crop, so it takes two launches and the sum of the
tiles' means between them, and two launches more where views are blurred:
    resize   a program makes 32 x 32 results of a channel: along rows tap by tap, the filter's weights shared by the
             rows; then along columns as a product on tensor cores (3 of fp16, with fp32 sums), never stored between
    color    all that is done pixel by pixel, in place
    blur     along columns, then along rows, transposed in between: each a filter along the slow axis
The resized crop waits in the result's own memory. Bytes a value of a result in 16 bit, beside the crop's own: 6 (out,
in, out), and 8 more where it is blurred (out, in; out, in). A filter of s x s taps costs some 2 s + 20 multiplications
a value instead of s^2, each with a load, and its weights 1/16 of what they cost if made for every value. No gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._dispatch import NAMESPACE, choose, triton_unsupported_reason
from .._native import native_unsupported_reason
from .._transforms import is_transformed
from .eager import FACTORS, halves, views_reference
from .triton import views_triton

INTERPOLATIONS = ("bilinear", "bicubic")
PLACE, BOX = 4, 6  # numbers that describe an image, a view
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op(f"{NAMESPACE}::views", mutates_args=())
def _op(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor,
    height: int, width: int, interpolation: str, taps: Sequence[int], patch: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the views, as `make_views`."""
    out = _empty_views(pixels, places, boxes, factors, mean, std, height, width, interpolation, taps, patch, dtype)
    if not len(out):
        return out
    pixels, places, boxes, factors = (x.contiguous() for x in (pixels, places, boxes, factors))
    mean, std, both = mean.contiguous(), std.contiguous(), (taps[0], taps[1])
    implementation = made_by(pixels.device)
    if implementation == "reference":
        return out.copy_(
            views_reference(pixels, places, boxes, factors, mean, std, height, width, interpolation, both, patch, dtype)
        )
    fill = views_triton if implementation == "triton" else views_cpp
    fill(pixels, places, boxes, factors, mean, std, out, height, width, interpolation, both, patch)
    return out


def made_by(device: torch.device) -> str:
    """Choose the implementation for `device`: "triton", "cpp" (the compiled op on a CPU) or "reference" (torch)."""
    reasons = {
        "triton": triton_unsupported_reason(torch.empty(0, device=device)),
        "cpp": native_unsupported_reason("cpp", device, "views"),
        "reference": None,
    }
    return choose("views", device, reasons)


def views_cpp(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor, out: Tensor,
    height: int, width: int, interpolation: str, taps: tuple[int, int], patch: int,
) -> None:  # fmt: skip
    """Fill `out` by the compiled op; arguments as `make_views`, on a CPU, contiguous.

    Places may point to images in other memory than that of `pixels`: offsets count from its first byte, so that images
    need not be copied together.
    """
    torch.ops.upstep_ops.views(
        pixels, places, boxes, factors, mean, std, height, width, interpolation == "bicubic",
        *halves(taps, height, width), patch, out,
    )  # fmt: skip


@_op.register_fake
def _empty_views(
    pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor, mean: Tensor, std: Tensor,
    height: int, width: int, interpolation: str, taps: Sequence[int], patch: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    N, C = len(boxes), len(mean)
    shape = (N, (height // patch) * (width // patch), C * patch * patch) if patch else (N, C, height, width)
    return pixels.new_empty(shape, dtype=dtype)


def _validate_images(pixels: Tensor, places: Tensor, boxes: Tensor, factors: Tensor) -> None:
    if pixels.dtype != torch.uint8 or pixels.dim() != 1 or not pixels.is_contiguous():
        raise ValueError(f"make_views: pixels must be uint8 [bytes], got {pixels.dtype} {list(pixels.shape)}")
    for name, x, dtype, columns in (
        ("places", places, torch.int64, PLACE),
        ("boxes", boxes, torch.int32, BOX),
        ("factors", factors, torch.float32, FACTORS),
    ):
        if x.dtype != dtype or x.dim() != 2 or x.shape[1] != columns or x.device != pixels.device:
            got = f"{x.dtype} {list(x.shape)} on {x.device}"
            raise ValueError(f"make_views: {name} must be {dtype} [., {columns}] on {pixels.device}, got {got}")
    if len(factors) != len(boxes):
        raise ValueError(f"make_views: factors must have a row a box, got {len(factors)} for {len(boxes)}")


def _validate_options(
    height: int, width: int, interpolation: str, taps: tuple[int, int], patch: int, dtype: torch.dtype
) -> None:
    if min(height, width) < 1:
        raise ValueError(f"make_views: the size must be at least 1 x 1, got {height} x {width}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"make_views: interpolation must be {' or '.join(INTERPOLATIONS)}, got {interpolation!r}")
    if min(taps) < 1 or not all(t % 2 for t in taps):
        raise ValueError(f"make_views: taps must be odd and at least 1, got {taps}")
    if patch < 0 or (patch and (height % patch or width % patch)):
        raise ValueError(f"make_views: patch must divide {height} x {width}, got {patch}")
    if dtype not in DTYPES:
        raise ValueError(f"make_views: dtype must be fp32, fp16 or bf16, got {dtype}")


def make_views(
    pixels: Tensor,
    places: Tensor,
    boxes: Tensor,
    factors: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    height: int,
    width: int,
    *,
    interpolation: str = "bilinear",
    taps: tuple[int, int] = (1, 1),
    patch: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make views of packed images: [N, C, height, width], or patches [N, (height / P)(width / P), C P P], in `dtype`.

    pixels: uint8, one dimension, all images behind one another.
    places: [B, 4] int64, of each image the offset of its first pixel and its strides over channels, rows and columns.
    boxes: [N, 6] int32, of each view the image; top, left, height and width of the crop in pixels; its orientation:
        the sum of FLIP_Y and FLIP_X (mirrored up-down, left-right) and TRANSPOSE (then transposed; square views only).
    factors: [N, 7] fp32, of each view the factors of brightness, contrast and saturation, the shift of the hue as a
        part of the circle, whether to make it gray (0 or 1), sigma of the blur in pixels (0: none) and whether to
        solarize it (0 or 1).
    mean, std: of each of C channels.
    taps: of the blur, rows and columns, odd; (1, 1): no view is blurred.
    patch: P, the side of a patch; 0: return images. dtype: fp32, fp16 or bf16.

    Boxes must lie inside their images: this is not checked, it would wait for the device. Raises ValueError for
    shapes and types that do not fit, NotImplementedError for factors that need a gradient.
    """
    _validate_images(pixels, places, boxes, factors)
    if factors.requires_grad or is_transformed("make_views", pixels, factors):
        raise NotImplementedError("make_views: has no derivative; detach factors, and call it outside torch.func")
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=pixels.device) for v in (mean, std))
    if mean.dim() != 1 or mean.shape != std.shape or not len(mean):
        raise ValueError(f"make_views: mean and std must be [C], got {list(mean.shape)} and {list(std.shape)}")
    _validate_options(height, width, interpolation, taps, patch, dtype)
    return _op(pixels, places, boxes, factors, mean, std, height, width, interpolation, taps, patch, dtype)
