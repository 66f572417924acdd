"""What `lora_linear` and `lora_linear_fp8` ask of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STRATEGIES = ("reference", "split", "wide_k", "merged", "triton")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def flat(rows: Sequence[tuple[int, int]] | None) -> list[int]:
    """Start and stop in turn; empty for all rows."""
    return [] if rows is None else [int(edge) for span in rows for edge in span]


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed of dropout on `device`; None: drawn from torch's generator."""
    # on the device, so that a captured graph draws anew at each replay
    if seed is None:
        return torch.randint(2**31, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed & 0x7FFFFFFF, device=device)


def complaint(x, weight, bias, lora_a, lora_b, scale, dropout, rows, strategy, *, weight_dtype=None) -> str | None:
    """What is wrong with the arguments, or None."""
    if x.dtype not in _DTYPES:
        return f"x must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}"
    if weight.dim() != 2 or 0 in weight.shape:
        return f"weight must be [N, K] with N, K >= 1, got {list(weight.shape)}"
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        return f"x must be [..., {K}] to fit weight {list(weight.shape)}, got {list(x.shape)}"
    if bias is not None and bias.shape != (N,):
        return f"bias must be [{N}], got {list(bias.shape)}"
    if lora_b.dim() != 2 or lora_b.shape[1] < 1:
        return f"lora_b must be [rows, r] with r >= 1, got {list(lora_b.shape)}"
    edges = rows or [0, N]
    # a range has at least one row; the next may begin where it ends
    rises = all(edges[i] + (i % 2 == 0) <= edges[i + 1] for i in range(len(edges) - 1))
    if len(edges) % 2 or not rises or edges[0] < 0 or edges[-1] > N:
        return f"rows must be rising pairs (start, stop) within the {N} rows of weight, got {rows}"
    adapted, rank = sum(edges[1::2]) - sum(edges[::2]), len(edges) // 2 * lora_b.shape[1]
    if lora_b.shape[0] != adapted:
        return f"lora_b must be [{adapted}, r], one row for each adapted row of weight, got {list(lora_b.shape)}"
    if lora_a.shape != (rank, K):
        return f"lora_a must be [{rank}, {K}] to fit lora_b and weight, got {list(lora_a.shape)}"
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} must be on {x.device} as x is, got {tensor.device}"
        is_adapter = name.startswith("lora")
        wanted = weight_dtype if name == "weight" and weight_dtype else x.dtype
        if tensor.dtype != wanted and not (is_adapter and tensor.dtype == torch.float32):
            cure = "; for an fp8 weight call lora_linear_fp8" if tensor.dtype == torch.float8_e4m3fn else ""
            return f"{name} must be {wanted}{' or torch.float32' * is_adapter}, got {tensor.dtype}{cure}"
    if not math.isfinite(scale):
        return f"scale must be finite, got {scale}"
    if not 0 <= dropout < 1:
        return f"dropout must be in [0, 1), got {dropout}"
    if strategy not in (None, "fastest", *STRATEGIES):
        return f"strategy must be None, 'fastest' or one of {', '.join(STRATEGIES)}, got {strategy!r}"
    if dropout and strategy in ("wide_k", "merged"):
        return f"strategy {strategy!r} has no dropout; take split, triton or reference"
    return None
