"""Images to patches, so that a Vision Transformer's patch embedding is one matrix product.

    out[b, gy * GW + gx, (c * P + i) * P + j] = images[b, c, gy * P + i, gx * P + j]

B images, C channels, P patch side, GH x GW patches. A row has the order of the flattened kernel of a convolution, so
    patchify(images, P) @ conv.weight.flatten(1).T + conv.bias  ==  conv(images).flatten(2).mT      stride P

The strided convolution takes 2.20 ms (ViT-B/16, 256 images, H200, bf16); patches and the product 0.24 ms.
Backward puts the gradient's entries back; nothing is saved.
Bytes moved: the images once in, the patches once out; the change of dtype costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._autocast import autocast_dtype
from ._dispatch import NAMESPACE, choose, triton_unsupported_reason
from ._tile_sizes import tile
from ._transforms import is_transformed
from ._triton import cdiv, on_device_of, tl, triton

_DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def patchify_reference(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """Compute the specification of `patchify` (its arguments)."""
    return in_patches(images, patch).to(dtype).flatten(3).flatten(1, 2)


def in_patches(images: Tensor, patch: int) -> Tensor:
    """View images [B, C, H, W] as [B, GH, GW, C, P, P], without a copy."""
    return images.unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 1, 3, 5)


def unpatchify_reference(patches: Tensor, patch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return the images [B, C, height, width] of `patches` [B, N, C P P], in `dtype`."""
    GH, GW = height // patch, width // patch
    B, C = patches.shape[0], patches.shape[2] // patch**2
    cells = patches.to(dtype).reshape(B, GH, GW, C, patch, patch)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(B, C, height, width)


@triton.jit
def _patchify_kernel(
    images, patches,
    C, GH, GW,
    stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Move one channel of BLOCK_G neighboring patches; INVERSE: from patches to images."""
    strip, gx = tl.program_id(0), tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    c, gy, b = strip % C, strip // C % GH, (strip // (C * GH)).to(tl.int64)
    e = tl.arange(0, BLOCK_P)
    mask = (gx < GW)[:, None] & (e < P * P)[None, :]
    y, x = gy * P + e // P, gx[:, None] * P + (e % P)[None, :]
    at_image = images + b * stride_b + c.to(tl.int64) * stride_c + y.to(tl.int64)[None, :] * stride_h + x * stride_w
    n = (b * GH + gy) * GW + gx
    at_patch = patches + (n[:, None] * C + c) * (P * P) + e[None, :]
    if INVERSE:
        tl.store(at_image, tl.load(at_patch, mask=mask).to(images.dtype.element_ty), mask=mask)
    else:
        tl.store(at_patch, tl.load(at_image, mask=mask).to(patches.dtype.element_ty), mask=mask)


def _patchify_triton(images: Tensor, patches: Tensor, patch: int, inverse: bool) -> None:
    """Fill `patches` [B, N, C * P * P], contiguous, from `images` [B, C, H, W], or back."""
    (B, C, H, W), block = images.shape, 1 << (patch * patch - 1).bit_length()
    GH, GW, cells = H // patch, W // patch, tile("patchify", images.device)
    wide = min(max(cells["CELLS"] // block, 1), 1 << (GW - 1).bit_length())
    with on_device_of(images):
        _patchify_kernel[(B * C * GH, cdiv(GW, wide))](
            images, patches, C, GH, GW, *images.stride(),
            P=patch, INVERSE=inverse, BLOCK_G=wide, BLOCK_P=block, num_warps=cells["num_warps"], enable_fp_fusion=True,
        )  # fmt: skip


def _takes_triton(op: str, x: Tensor, patch: int) -> bool:
    too_large = f"a patch of {patch} x {patch} exceeds the 64 x 64 of one program" if patch > 64 else None
    reason = too_large or triton_unsupported_reason(x)
    return x.numel() > 0 and choose(op, x.device, {"triton": reason, "reference": None}) == "triton"


@torch.library.custom_op(f"{NAMESPACE}::patchify", mutates_args=())
def _patchify_op(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    patches = _patches(images, patch, dtype)
    if _takes_triton("patchify", images, patch):
        _patchify_triton(images, patches, patch, inverse=False)
        return patches
    cells = in_patches(images, patch)
    patches.view(cells.shape).copy_(cells)  # the reference in one copy
    return patches


@_patchify_op.register_fake
def _patches(images: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    B, C, H, W = images.shape
    return images.new_empty(B, (H // patch) * (W // patch), C * patch * patch, dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::patchify_backward", mutates_args=())
def _unpatchify_op(grad: Tensor, patch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    images = _images(grad, patch, height, width, dtype)
    if _takes_triton("patchify_backward", grad, patch):
        _patchify_triton(images, grad.contiguous(), patch, inverse=True)
        return images
    return images.copy_(unpatchify_reference(grad, patch, height, width, dtype))


@_unpatchify_op.register_fake
def _images(grad: Tensor, patch: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[2] // patch**2, height, width, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    images, ctx.patch, _ = inputs
    ctx.size, ctx.dtype = images.shape[2:], images.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _unpatchify_op(grad, ctx.patch, *ctx.size, ctx.dtype), None, None


def _setup_inverse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, ctx.patch, *_ = inputs
    ctx.dtype = grad.dtype


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _patchify_op(grad, ctx.patch, ctx.dtype), None, None, None, None


_patchify_op.register_autograd(_backward, setup_context=_setup_context)
_unpatchify_op.register_autograd(_inverse_backward, setup_context=_setup_inverse)


def patchify(images: Tensor, patch: int, dtype: torch.dtype | None = None) -> Tensor:
    """Cut images [B, C, H, W] (uint8 or float, any strides) to patches [B, H/P * W/P, C * P * P] in `dtype`.

    patch: P, which divides H and W. dtype: a float one; None: autocast's where it is on, else that of the images
    (uint8: fp32). Entries are cast, not scaled. The gradient goes back to float images.
    Raises ValueError for arguments that do not fit.
    """
    if images.dim() != 4 or images.dtype not in _DTYPES:
        got = f"{list(images.shape)} in {images.dtype}"
        raise ValueError(f"patchify: images must be [B, C, H, W] in uint8, fp16, bf16, fp32 or fp64, got {got}")
    if patch < 1 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(f"patchify: patch must divide height and width {list(images.shape[2:])}, got {patch}")
    if dtype is None:
        default = images.dtype if images.is_floating_point() else torch.float32
        dtype = autocast_dtype(images.device) or default
    if dtype not in _DTYPES[1:]:
        raise ValueError(f"patchify: dtype must be fp16, bf16, fp32 or fp64, got {dtype}")
    if is_transformed("patchify", images):
        return patchify_reference(images, patch, dtype)
    return _patchify_op(images, patch, dtype)
