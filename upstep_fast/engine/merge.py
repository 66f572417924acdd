"""Merges adapters into the frozen weights, once per step; every path of the engine multiplies by the result.

Merging keeps the adapter in fp32 and rounds W + s B A once, as mixed-precision training rounds every weight each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upstep_fast.engine.fold import FoldedBlock, FoldedLinear
from upstep_fast.engine.projections import Fp8Projection, Fp8Weight, MergedProjection, Projection


@dataclass(frozen=True)
class MergedBlock:
    """A folded block with its adapters merged; trained: `FoldedBlock.trained_tensors`, detached."""

    block: FoldedBlock
    projections: list[Projection]  # qkv, proj, fc1, fc2
    trained: list[Tensor]

    def update(self, new: MergedBlock) -> None:
        """Copy `new` into the memory of this block, which a CUDA graph reads."""
        for old, update in zip(self.projections, new.projections, strict=True):
            if isinstance(old, MergedProjection) and isinstance(update, MergedProjection):
                _copy((old.weight, old.bias), (update.weight, update.bias))
            elif isinstance(old, Fp8Projection) and isinstance(update, Fp8Projection):
                _copy(old.factors or (), update.factors or ())
        _copy(self.trained, new.trained)


def make_merger(blocks: Sequence[FoldedBlock | nn.Module]) -> Callable[[], dict[int, MergedBlock]]:
    """Return a function that merges the adapters as they are now; it gives every folded block by its index.

    Trained adapters are merged at every call: fused optimizers do not move version counters (torch 2.15), so a change
    cannot be detected. Frozen ones are merged again when their version has moved.
    """
    merged: dict[int, MergedBlock] = {}
    merged_versions: list[int] = []

    def refresh() -> dict[int, MergedBlock]:
        folded = {index: block for index, block in enumerate(blocks) if isinstance(block, FoldedBlock)}
        parameters = [p for block in folded.values() for p in block.trainable_parameters()]
        versions = [p._version for p in parameters]
        if not merged or versions != merged_versions or any(p.requires_grad for p in parameters):
            for index, block in folded.items():
                new = _merge_block(block, merged.get(index))
                merged.setdefault(index, new).update(new)
            merged_versions[:] = versions
        return merged

    return refresh


def merge(linear: FoldedLinear, factors: Sequence[Tensor] | None, into: Projection | None = None) -> Projection:
    """Compute W + s B A and b + s B (A beta) in fp32, rounded once; where W is in fp8, keep the adapter separate.

    factors: (A, A beta, s B) or None. into: an earlier result for `linear`, whose memory is written to, only in the
    rows that an adapter adds to.
    """
    if isinstance(linear.weight, Fp8Weight):
        low = None if factors is None else [f.detach().to(linear.bias.dtype) for f in factors]
        return Fp8Projection(linear.weight, linear.bias, low, linear.parts)
    if factors is None:
        return MergedProjection(linear.weight, linear.bias)
    a, shift, b = (f.detach() for f in factors)
    merged = MergedProjection(linear.weight.clone(), linear.bias.clone()) if into is None else into
    assert isinstance(merged, MergedProjection)
    num_rows = b.shape[1]
    for t, part in enumerate(linear.parts):
        rows = slice(part * num_rows, (part + 1) * num_rows)
        merged.weight[rows] = linear.weight[rows].to(torch.float32, copy=True).addmm_(b[t], a[t])
        merged.bias[rows] = linear.bias[rows].to(torch.float32, copy=True).addmv_(b[t], shift[t])
    return merged


def merge_all(
    block: FoldedBlock, trained: Sequence[Tensor], into: Sequence[Projection | None] = (None,) * 4
) -> list[Projection]:
    """Merge the block's four projections. trained: of `FoldedBlock.trained_tensors`; into: as for `merge`."""
    factors = factors_of(block, trained)
    pairs = zip(block.linears.items(), into, strict=True)
    return [merge(linear, factors.get(name), old) for (name, linear), old in pairs]


def factors_of(block: FoldedBlock, trained: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """Return (A, A beta, s B) of the projections with an adapter; they stand first in `trained`, three each."""
    names = [name for name, linear in block.linears.items() if linear.adapters]
    return {name: trained[3 * i : 3 * i + 3] for i, name in enumerate(names)}


def adapter_gradients(
    dy: Tensor, h: Tensor, linear: FoldedLinear, factors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (A [T, r, K], A beta [T, r], s B [T, n, r]) in fp32; dy: [..., N], h: [..., K]."""
    a, shift, b = (f.detach() for f in factors)
    dy, h = dy.flatten(0, -2), h.flatten(0, -2)
    low = F.linear(h, a.flatten(0, 1).to(h.dtype), shift.flatten().to(h.dtype))  # [M, T r]
    num_rows, r = b.shape[1:]
    d_low, d_b = torch.empty_like(low), torch.empty_like(b)
    for t, part in enumerate(linear.parts):
        dy_part, columns = dy[:, part * num_rows : (part + 1) * num_rows], slice(t * r, (t + 1) * r)
        d_b[t] = dy_part.T @ low[:, columns]
        d_low[:, columns] = dy_part @ b[t].to(dy.dtype)
    return (d_low.T @ h).float().view_as(a), d_low.float().sum(0).view_as(shift), d_b


def _copy(old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    for tensor, value in zip(old, new, strict=True):
        # a frozen weight or a parameter itself needs no copy, which would count as a change of it; data_ptr() warns on
        # fake tensors
        if not torch._C._is_alias_of(tensor, value):  # type: ignore[attr-defined]
            tensor.copy_(value)


def _merge_block(block: FoldedBlock, old: MergedBlock | None) -> MergedBlock:
    # in fp32 whatever autocast the caller is in
    with torch.autocast(block.qkv.bias.device.type, enabled=False):
        trained = [tensor.detach() for tensor in block.trained_tensors()]
        projections = merge_all(block, trained, old.projections) if old else merge_all(block, trained)
        return MergedBlock(block, projections, trained)
