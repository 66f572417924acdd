"""Row-wise fp8 (e4m3): each row is scaled so that its largest entry becomes 448, the largest e4m3 number.

    scale = max(1e-30, max_k |x|) / 448        [M, 1], fp32
    q     = e4m3(x * (1 / scale))              [M, K]            x ~ q * scale

M rows, K columns. The floor gives a row of zeros q = 0 and a finite scale. A NaN or an infinity makes its row's scale
non-finite, so the whole row dequantizes to non-finite values and cannot pass unseen.

`scale` has the shape that torch._scaled_mm takes for row-wise scales of its left operand.
No gradient: weights that are quantized are frozen, and the engine's backward is written by hand.
Bytes moved: x once in, q once out (1 byte a cell); eager reads x twice and writes it once more between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dispatch import NAMESPACE, choose, triton_unsupported_reason
from ._tile_sizes import MAX_ROW, row_tile
from ._triton import INTERPRET, cdiv, on_device_of, tl, triton

E4M3 = torch.float8_e4m3fn
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the specification, (q, scale) as `quantize` returns them."""
    x = x.float()
    amax = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = amax.clamp_min(1e-30) / 448
    return (x * scale.reciprocal()).to(E4M3), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compute q [..., K] (fp8) times its row scales [..., 1] in `dtype`. Raises ValueError for unfit scales."""
    if scale.shape != (*q.shape[:-1], 1) or scale.device != q.device:
        expected, got = (*q.shape[:-1], 1), f"{list(scale.shape)} on {scale.device}"
        raise ValueError(f"dequantize: scale must be {list(expected)} on {q.device} to fit q, got {got}")
    return (q.float() * scale).to(dtype)


@triton.jit
def row_scales(x):
    """Compute the scale of each row of x [rows, columns] (fp32, 0 where masked), and its inverse."""
    # as integers, the bits of |x| are ordered as the numbers are, infinity and then NaN above all; 1e-30 is 0x0DA24260
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    amax = tl.maximum(bits, 0x0DA24260).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, 448.0)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def e4m3_codes(x, NATIVE: tl.constexpr):
    """Round x (fp32, at most 448 in size) to the nearest e4m3, ties to even; returns its bytes."""
    if NATIVE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 3 bits of mantissa remain, and the exponent's bias goes from 127 to 7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the steps are 2^-9: that is the last bit of a number just above 2^14
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(size < (121 << 23), subnormal, tl.minimum(normal, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _quantize_kernel(
    x, q, scale,
    M, K,
    stride_xm,
    NATIVE_FP8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mask = (m < M)[:, None] & (k < K)[None, :]
    row = m.to(tl.int64)[:, None]
    b_x = tl.load(x + row * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
    b_scale, b_inverse = row_scales(b_x)
    tl.store(q + row * K + k[None, :], e4m3_codes(b_x * b_inverse[:, None], NATIVE_FP8), mask=mask)
    tl.store(scale + m, b_scale, mask=m < M)


def native_fp8(device: torch.device) -> bool:
    """Return whether the GPU itself rounds to e4m3; the interpreter does too, but loses a carry (triton 3.6, 3.9)."""
    return device.type == "cuda" and not INTERPRET and torch.cuda.get_device_capability(device) >= (8, 9)


def row_unsupported_reason(K: int, *tensors: Tensor | None) -> str | None:
    """Return why a Triton kernel that holds whole rows of K cells cannot take these tensors, or None."""
    if K > MAX_ROW:
        return f"rows of {K} cells exceed the {MAX_ROW} that a program holds"
    return triton_unsupported_reason(*tensors)


def _quantize_triton(x: Tensor, native: bool) -> tuple[Tensor, Tensor]:
    (M, K), tiles = x.shape, row_tile("quantize", x.device, x.shape[1])
    x = x if x.stride(1) == 1 else x.contiguous()
    q, scale = x.new_empty(M, K, dtype=torch.uint8), x.new_empty(M, 1, dtype=torch.float32)
    with on_device_of(x):
        _quantize_kernel[(cdiv(M, tiles["BLOCK_M"]),)](
            x, q, scale, M, K, x.stride(0),
            NATIVE_FP8=native, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
    return q.view(E4M3), scale


@torch.library.custom_op(f"{NAMESPACE}::quantize", mutates_args=())
def _quantize_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (q [M, K], scale [M, 1])."""
    reason = row_unsupported_reason(x.shape[1], x)
    if x.numel() and choose("quantize", x.device, {"triton": reason, "reference": None}) == "triton":
        return _quantize_triton(x, native_fp8(x.device))
    return quantize_reference(x.contiguous())


@_quantize_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=E4M3, device=x.device), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize x [..., K] (fp16, bf16 or fp32) to (q [..., K] in fp8 e4m3, scale [..., 1] in fp32), x ~ q * scale.

    No gradient flows to x. Autocast leaves it alone. Raises ValueError for another dtype or a scalar.
    """
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise ValueError(f"quantize: x must be [..., K] in fp16, bf16 or fp32, got {list(x.shape)} in {x.dtype}")
    q, scale = _quantize_op(x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return q.view(x.shape), scale.view(*x.shape[:-1], 1)
