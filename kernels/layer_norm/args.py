"""Arguments of the layer-norm ops and their checks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rows_of(x: Tensor, K: int) -> Tensor:
    """Return x [..., K] as [M, K]."""
    return x.reshape(math.prod(x.shape[:-1]), K)


def unsupported_reason(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    eps: float,
    fp8: bool,
) -> str | None:
    """Return what is wrong with the arguments, or None."""
    options = _unsupported_options(x, weight, bias, eps, fp8)
    return options or _unsupported_tensors(x, residual, weight, bias, lora_a)


def _unsupported_options(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, fp8: bool) -> str | None:
    if x.dtype not in DTYPES[: 3 if fp8 else 4] or x.dim() == 0:
        return f"x must be [..., K] in fp16, bf16, fp32{'' if fp8 else ' or fp64'}, got {list(x.shape)} in {x.dtype}"
    if not eps > 0:
        return f"eps must be above 0, got {eps}"
    if bias is not None and weight is None:
        return "bias wants a weight, got None"
    return None


def _unsupported_tensors(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, lora_a: Tensor | None
) -> str | None:
    K, either = x.shape[-1], (x.dtype, torch.float32)
    rank = lora_a.shape[0] if lora_a is not None and lora_a.dim() == 2 else 1
    if residual is not None and (reason := _misfit("residual", residual, x, x.shape, (x.dtype,))):
        return reason
    if weight is not None and (reason := _misfit("weight", weight, x, (K,), either)):
        return reason
    if bias is not None and (reason := _misfit("bias", bias, x, (K,), either)):
        return reason
    return None if lora_a is None else _misfit("lora_a", lora_a, x, (rank, K), (x.dtype,))


def _misfit(name: str, t: Tensor, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    if t.shape == shape and t.dtype in dtypes and t.device == x.device:
        return None
    want = f"{list(shape)} in {' or '.join(map(str, dict.fromkeys(dtypes)))} on {x.device}"
    return f"{name} must be {want} to fit x, got {list(t.shape)} in {t.dtype} on {t.device}"
