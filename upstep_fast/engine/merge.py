"""Adapters merged into the frozen weights, once a step; every path of the engine multiplies by these.

Merging keeps the adapter in fp32 and rounds W + s B A once, as mixed-precision training does to every weight each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upstep_fast.engine.fold import FoldedBlock, FoldedLinear
from upstep_fast.engine.projections import Fp8Projection, Fp8Weight, MergedProjection, Projection


@dataclass(frozen=True)
class MergedBlock:
    """A folded block with its adapters merged, and what of it is trained: `FoldedBlock.trained`, without gradients."""

    block: FoldedBlock
    merged: list[Projection]  # qkv, proj, fc1, fc2
    trained: list[Tensor]

    def update(self, new: MergedBlock) -> None:
        """Write `new` into the same memory, which a CUDA graph reads."""
        for before, now in zip(self.merged, new.merged, strict=True):
            if isinstance(before, MergedProjection) and isinstance(now, MergedProjection):
                _copy((before.weight, before.bias), (now.weight, now.bias))
            elif isinstance(before, Fp8Projection) and isinstance(now, Fp8Projection):
                _copy(before.factors or (), now.factors or ())
        _copy(self.trained, new.trained)


def make_merger(blocks: Sequence[FoldedBlock | nn.Module]) -> Callable[[], dict[int, MergedBlock]]:
    """A function that gives every folded block, by its index, with its adapters merged as they are now.

    What is trained is merged at every call: fused optimizers do not move version counters (torch 2.15), so a change
    cannot be seen. What is frozen is merged again when its version has moved.
    """
    ready: dict[int, MergedBlock] = {}
    versions: list[int] = []

    def refresh() -> dict[int, MergedBlock]:
        folded = {index: block for index, block in enumerate(blocks) if isinstance(block, FoldedBlock)}
        sources = [p for block in folded.values() for p in block.sources()]
        now = [p._version for p in sources]
        if not ready or now != versions or any(p.requires_grad for p in sources):
            for index, block in folded.items():
                new = _merge_block(block, ready.get(index))
                ready.setdefault(index, new).update(new)
            versions[:] = now
        return ready

    return refresh


def merge(linear: FoldedLinear, factors: Sequence[Tensor] | None, into: Projection | None = None) -> Projection:
    """W + s B A and b + s B (A beta), added in fp32 and rounded once; apart where W is in fp8.

    factors: (A, A beta, s B) or None. into: an earlier result for `linear`, whose memory is written to; of a merged
    weight only the rows that an adapter adds to.
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
    """The block's four projections. trained: what `FoldedBlock.trained` gives; into: as for `merge`."""
    factors = factors_of(block, trained)
    pairs = zip(block.linears.items(), into, strict=True)
    return [merge(linear, factors.get(name), before) for (name, linear), before in pairs]


def factors_of(block: FoldedBlock, trained: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """(A, A beta, s B) by projection, for those with an adapter; they stand first in `trained`, three each."""
    names = [name for name, linear in block.linears.items() if linear.adapters]
    return {name: trained[3 * i : 3 * i + 3] for i, name in enumerate(names)}


def _copy(before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
    for tensor, value in zip(before, now, strict=True):
        # a frozen weight or a parameter itself needs no copy, which would count as a change of it; data_ptr() warns on
        # fake tensors
        if not torch._C._is_alias_of(tensor, value):  # type: ignore[attr-defined]
            tensor.copy_(value)


def _merge_block(block: FoldedBlock, before: MergedBlock | None) -> MergedBlock:
    # in fp32 whatever autocast the caller is in
    with torch.autocast(block.qkv.bias.device.type, enabled=False):
        trained = [tensor.detach() for tensor in block.trained()]
        merged = merge_all(block, trained, before.merged) if before else merge_all(block, trained)
        return MergedBlock(block, merged, trained)
