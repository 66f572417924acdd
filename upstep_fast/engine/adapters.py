"""The adapters of equal shape in all blocks, folded together: a step takes few launches, whatever the depth.

A' = A gamma,  A' beta' = A beta,  B' = s B (times LayerScale)       L blocks, T parts, in fp32: see fold.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.engine.fold import FoldedBlock, FoldedLinear


@dataclass(frozen=True)
class AdapterGroup:
    """One adapted projection of the L blocks in which its shapes are equal, and what its adapters are folded with."""

    places: list[tuple[int, str]]  # index of the block, name of the projection
    linears: list[FoldedLinear]
    is_wide: bool  # s B as one block-diagonal matrix, and merged by products over all blocks: on a GPU
    rank: int  # the largest
    scale: Tensor  # [L T, 1, 1], fp32
    norm: tuple[Tensor, Tensor] | None  # gamma [L, 1, 1, K], beta [L, K]
    layer_scale: Tensor | None  # [L, T, n, 1]
    mask: Tensor | None  # [span, 1, T, 1] bool: where parts and ranks meet, if s B is block-diagonal; None: by parts

    @property
    def parts(self) -> tuple[int, ...]:
        """For each of the T parts, the block of n output columns it adds to."""
        return self.linears[0].parts

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (A [L, T, r, K], A beta [L, T, r], s B [L, T, n, r]) in fp32, differentiable in the parameters."""
        modules, r = [m for linear in self.linears for m in linear.adapters], self.rank
        size = (len(self.linears), len(self.parts))
        # separate adapters of q, k and v may differ in rank: pad with zeros
        a = torch.cat([F.pad(m.lora_a, (0, 0, 0, r - m.r)) if m.r < r else m.lora_a for m in modules]).float()
        b = torch.cat([F.pad(m.lora_b, (0, r - m.r)) if m.r < r else m.lora_b for m in modules]).float()
        a, b = a.unflatten(0, size), (b * self.scale).unflatten(0, size)
        shift = a.new_zeros(a.shape[:-1])
        if self.norm is not None:
            gamma, beta = self.norm
            rows = a.flatten(1, 2)
            if self.is_wide:
                products = rows @ beta[..., None]
            else:  # one by one: the bits of a batched product are others
                products = torch.stack([x @ y for x, y in zip(rows, beta, strict=True)])
            a, shift = a * gamma, products.view(shift.shape)
        return a, shift, b if self.layer_scale is None else b * self.layer_scale

    def layout(self, b: Tensor) -> Tensor:
        """Return b [L, T, n, r] in the layout of low_rank.py, by parts or [L, 1, span n, T r].

        Differentiable: gradients outside the diagonal are dropped, also those that are not finite.
        """
        if self.mask is None:
            return b
        return torch.where(self.mask, b.transpose(1, 2)[:, None], 0).flatten(1, 2).flatten(2)[:, None]

    def first_columns(self) -> tuple[int, ...]:
        """Return the first output column of each block of `layout`."""
        n = self.linears[0].adapters[0].lora_b.shape[1]
        return tuple(part * n for part in (self.parts if self.mask is None else self.parts[:1]))


def group_adapters(blocks: Mapping[int, FoldedBlock]) -> list[AdapterGroup]:
    """Group the adapted projections of the blocks by name and shape."""
    groups: dict[Any, list[tuple[int, str, FoldedLinear]]] = {}
    for index, block in blocks.items():
        for name, linear in block.linears.items():
            if linear.adapters:
                is_wide = block.fused or linear.bias.is_cuda
                absent = linear.norm is None, linear.layer_scale is None
                ranks = tuple(adapter.r for adapter in linear.adapters)
                first = linear.adapters[0]
                shapes = first.lora_a.shape, first.lora_b.shape, linear.bias.shape
                key = name, is_wide, absent, ranks, linear.parts, shapes
                groups.setdefault(key, []).append((index, name, linear))
    return [_group(rows, key[1]) for key, rows in groups.items()]


def _group(rows: Sequence[tuple[int, str, FoldedLinear]], is_wide: bool) -> AdapterGroup:
    linears = [linear for *_, linear in rows]
    modules, num = [m for linear in linears for m in linear.adapters], len(linears)
    device = modules[0].lora_b.device
    scales = [m.scale for m in modules for _ in range(len(m.lora_b))]
    norm = layer_scale = None
    if linears[0].norm is not None:
        gamma, beta = (torch.stack(rows) for rows in zip(*(linear.norm or () for linear in linears), strict=True))
        norm = gamma.view(num, 1, 1, -1), beta
    if linears[0].layer_scale is not None:
        n = modules[0].lora_b.shape[1]
        rows_of = [(linear.layer_scale, part) for linear in linears for part in linear.parts]
        chosen = [scale[part * n : (part + 1) * n] for scale, part in rows_of if scale is not None]
        layer_scale = torch.stack(chosen).view(num, -1, n, 1)
    return AdapterGroup(
        places=[(index, name) for index, name, _ in rows],
        linears=linears,
        is_wide=is_wide,
        rank=max(m.r for m in modules),
        scale=torch.tensor(scales, device=device)[:, None, None],
        norm=norm,
        layer_scale=layer_scale,
        mask=_diagonal(linears[0].parts, device) if is_wide and len(linears[0].parts) > 1 else None,
    )


def _diagonal(parts: Sequence[int], device: torch.device) -> Tensor:
    """Return [span, 1, T, 1] bool, True where the t-th part lies in the span from the first to the last."""
    span = torch.arange(parts[0], parts[-1] + 1, device=device)
    return (span[:, None] == torch.tensor(parts, device=device))[:, None, :, None]
