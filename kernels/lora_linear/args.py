"""Arguments of `lora_linear` and `lora_linear_fp8`: the adapter that all strategies take, and the checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

STRATEGIES = ("reference", "split", "wide_k", "merged", "triton")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoraArgs:
    """Adapter of a frozen weight [N, K], as the strategies take it."""

    a: Tensor  # [T r, K], the T adapters stacked
    b: Tensor  # [number of adapted rows, r]
    scale: float
    dropout: float  # probability of zeroing an entry of x
    seed: Tensor | None  # of dropout, int64 of one element; None without dropout
    rows: Sequence[int]  # of the weight: start and stop of each adapter in turn; empty: all N, by one adapter

    def to(self, dtype: torch.dtype) -> LoraArgs:
        """Return the adapter with a and b in `dtype`."""
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))

    def adapters(self, num_rows: int) -> list[tuple[slice, slice, Tensor]]:
        """Return (rows of the weight, ranks: rows of a, block of b [length, r]) of each adapter; num_rows: N."""
        rows, r = self.rows or [0, num_rows], self.b.shape[1]
        spans = [slice(*rows[i : i + 2]) for i in range(0, len(rows), 2)]
        blocks = self.b.split([span.stop - span.start for span in spans])
        return [(span, slice(t * r, t * r + r), b) for t, (span, b) in enumerate(zip(spans, blocks, strict=True))]


def flat(rows: Sequence[tuple[int, int]] | None) -> list[int]:
    """Flatten row ranges to start and stop in turn; empty for None (all rows)."""
    return [] if rows is None else [int(edge) for span in rows for edge in span]


def pairs(rows: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return the (start, stop) pairs that `flat` made `rows` of; None for all rows."""
    return list(zip(rows[::2], rows[1::2], strict=True)) or None


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """Return the seed of dropout as an int64 scalar on `device`; None: drawn from torch's generator."""
    # on the device, so that a captured graph draws anew at each replay
    if seed is None:
        return torch.randint(2**31, (), device=device)
    return seed if isinstance(seed, Tensor) else torch.full((), seed & 0x7FFFFFFF, device=device)


def validate(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout: float,
    rows: Sequence[int],
    strategy: str | None,
    weight_dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError for arguments of `op` that do not fit. rows: flat; weight_dtype: None: that of x."""
    reason = (
        _unsupported_shapes(x, weight, bias, lora_a, lora_b, rows)
        or _unsupported_tensors(x, weight, bias, lora_a, lora_b, weight_dtype or x.dtype)
        or _unsupported_numbers(scale, dropout, strategy)
    )
    if reason:
        raise ValueError(f"{op}: {reason}")


def _unsupported_shapes(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, rows: Sequence[int]
) -> str | None:
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
    if not _are_rising_pairs(edges, N):
        return f"rows must be rising pairs (start, stop) within the {N} rows of weight, got {rows}"
    adapted, rank = sum(edges[1::2]) - sum(edges[::2]), len(edges) // 2 * lora_b.shape[1]
    if lora_b.shape[0] != adapted:
        return f"lora_b must be [{adapted}, r], one row for each adapted row of weight, got {list(lora_b.shape)}"
    if lora_a.shape != (rank, K):
        return f"lora_a must be [{rank}, {K}] to fit lora_b and weight, got {list(lora_a.shape)}"
    return None


def _are_rising_pairs(edges: Sequence[int], N: int) -> bool:
    # a range has at least one row; the next may begin where it ends
    rises = all(edges[i] + (i % 2 == 0) <= edges[i + 1] for i in range(len(edges) - 1))
    return len(edges) % 2 == 0 and rises and edges[0] >= 0 and edges[-1] <= N


def _unsupported_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, weight_dtype: torch.dtype
) -> str | None:
    for name, tensor in (("weight", weight), ("bias", bias), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            return f"{name} must be on {x.device} as x is, got {tensor.device}"
        is_adapter = name.startswith("lora")
        expected = weight_dtype if name == "weight" else x.dtype
        if tensor.dtype != expected and not (is_adapter and tensor.dtype == torch.float32):
            cure = "; for an fp8 weight call lora_linear_fp8" if tensor.dtype == torch.float8_e4m3fn else ""
            return f"{name} must be {expected}{' or torch.float32' * is_adapter}, got {tensor.dtype}{cure}"
    return None


def _unsupported_numbers(scale: float, dropout: float, strategy: str | None) -> str | None:
    if not -math.inf < scale < math.inf:  # math.isfinite breaks a graph where dynamo has made the number a symbol
        return f"scale must be finite, got {scale}"
    if not 0 <= dropout < 1:
        return f"dropout must be in [0, 1), got {dropout}"
    if strategy not in (None, "fastest", *STRATEGIES):
        return f"strategy must be None, 'fastest' or one of {', '.join(STRATEGIES)}, got {strategy!r}"
    if dropout and strategy in ("wide_k", "merged"):
        return f"strategy {strategy!r} has no dropout; take split, triton or reference"
    return None
