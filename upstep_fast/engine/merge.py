"""Merges adapters into the frozen weights, once per step; every path of the engine multiplies by the result.

    W' = W + s B A,   c' = c + s B (A beta)

All blocks together (adapters.py): on a GPU by batched products of the factors in the compute type, which add in fp32
and round once; elsewhere block by block in fp32, rounded once. Mixed-precision training rounds every weight each step,
too. Where W is in fp8, the adapter stays separate: it would be rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from upstep_fast.engine.adapters import AdapterGroup, group_adapters
from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.low_rank import LowRank
from upstep_fast.engine.projections import Fp8Projection, Fp8Weight, MergedProjection, Projection


@dataclass(frozen=True)
class MergedBlock:
    """A folded block with its adapters merged, in memory that stays where it is: CUDA graphs read it."""

    block: FoldedBlock
    projections: list[Projection]  # qkv, proj, fc1, fc2
    adapters: dict[str, LowRank]  # by name of the projection
    parameters: list[nn.Parameter]  # `FoldedBlock.trainable_parameters`
    # where gradients enter: A, A beta and s B of each adapter as in low_rank.py, (weight, bias) of each trained norm;
    # empty without gradients
    trained: Sequence[Tensor] = ()


@dataclass(frozen=True)
class _Merged:
    """The adapters of a group in the compute type, and the weights they are merged into, for its L blocks."""

    group: AdapterGroup
    a: Tensor  # [L, T r, K]
    shift: Tensor  # [L, T r]
    b: Tensor  # [L, ...] as in low_rank.py
    weight: Tensor | None  # [L, N, K]; None: the frozen weights are in fp8
    bias: Tensor  # [L, N]
    rows: list[Tensor]  # weight and bias of each block in turn
    frozen: list[Tensor]  # what they are without adapters

    @property
    def adapters(self) -> Iterator[LowRank]:
        """Return the adapter of each block."""
        first = self.group.first_columns()
        return (LowRank(*tensors, first) for tensors in zip(self.a, self.shift, self.b, strict=True))


def make_merger(blocks: Sequence[FoldedBlock | nn.Module]) -> Callable[[], dict[int, MergedBlock]]:
    """Return a function that merges the adapters as they are now; it gives every folded block by its index.

    Trained adapters are merged at every call: fused optimizers do not move version counters (torch 2.15), so a change
    cannot be detected. Frozen ones are merged again when their version has moved.
    """

    @cache
    def allocated() -> tuple[dict[int, MergedBlock], list[_Merged]]:
        folded = {index: block for index, block in enumerate(blocks) if isinstance(block, FoldedBlock)}
        groups = [_allocate(group) for group in group_adapters(folded)]
        return {index: _merged_block(index, block, groups) for index, block in folded.items()}, groups

    merged_versions: list[int] | None = None

    def refresh() -> dict[int, MergedBlock]:
        nonlocal merged_versions
        with torch.no_grad():
            merged, groups = allocated()
        parameters = [p for block in merged.values() for p in block.parameters]
        versions, is_trained = [p._version for p in parameters], any(p.requires_grad for p in parameters)
        if not is_trained and versions == merged_versions:
            return merged
        merged_versions = None if is_trained else versions  # once frozen, they are merged as they were trained last
        has_grad = is_trained and torch.is_grad_enabled()
        entries = {place: tensors for group in groups for place, tensors in _update(group, has_grad).items()}
        if not has_grad:
            return merged
        return {index: replace(block, trained=_entries(index, block, entries)) for index, block in merged.items()}

    return refresh


def _allocate(group: AdapterGroup) -> _Merged:
    linears, T = group.linears, len(group.parts)
    bias = torch.stack([linear.bias for linear in linears])
    weights = [linear.weight for linear in linears if not isinstance(linear.weight, Fp8Weight)]
    weight = torch.stack(weights) if weights else None
    rows = [] if weight is None else [t for pair in zip(weight, bias, strict=True) for t in pair]
    frozen = [t for linear in linears for t in (linear.weight, linear.bias) if isinstance(t, Tensor)]
    like = linears[0].adapters[0]
    shape = len(linears), T * group.rank, like.lora_a.shape[-1]
    b = group.layout(bias.new_empty(len(linears), T, like.lora_b.shape[1], group.rank))
    a, shift = bias.new_empty(shape), bias.new_empty(shape[:2])
    return _Merged(group, a, shift, b, weight, bias, rows, frozen)


def _merged_block(index: int, block: FoldedBlock, groups: Sequence[_Merged]) -> MergedBlock:
    adapters: dict[str, LowRank] = {}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for merged in groups:
        for row, (place, adapter) in enumerate(zip(merged.group.places, merged.adapters, strict=True)):
            if place[0] == index:
                adapters[place[1]] = adapter
                if merged.weight is not None:
                    sums[place[1]] = merged.weight[row], merged.bias[row]
    projections: list[Projection] = [
        Fp8Projection(linear.weight, linear.bias, adapters.get(name))
        if isinstance(linear.weight, Fp8Weight)
        else MergedProjection(*sums.get(name, (linear.weight, linear.bias)))
        for name, linear in block.linears.items()
    ]
    return MergedBlock(block, projections, adapters, block.trainable_parameters())


def _update(merged: _Merged, has_grad: bool) -> dict[tuple[int, str], tuple[Tensor, ...]]:
    """Write the adapters as they are now. Return, with gradients, where these enter, by place."""
    group, dtype = merged.group, merged.bias.dtype
    with torch.autocast(merged.bias.device.type, enabled=False):  # in fp32 whatever autocast the caller is in
        a, shift, b = group.factors()
        rounded = b.to(dtype)
        entering = a.flatten(1, 2).to(dtype), shift.flatten(1), group.layout(rounded)
        with torch.no_grad():
            for static, value in zip((merged.a, merged.shift, merged.b), entering, strict=True):
                static.copy_(value)
            if merged.weight is not None and group.is_wide:
                _merge_all(merged, merged.weight, rounded)
            elif merged.weight is not None:
                _merge_each(merged, merged.weight, a, shift, b)
    if not has_grad:
        return {}
    entries = zip(*(t.unbind() for t in entering), strict=True)
    return dict(zip(group.places, entries, strict=True))


def _merge_all(merged: _Merged, weight: Tensor, b: Tensor) -> None:
    """Merge all blocks by one batched product per part. weight: [L, N, K]; b: [L, T, n, r], rounded."""
    group, (L, T, n, r) = merged.group, b.shape
    torch._foreach_copy_(merged.rows, merged.frozen)
    weights, biases = weight.view(L, -1, n, weight.shape[2]), merged.bias.view(L, -1, n, 1)
    a, shift = merged.a.view(L, T, r, -1), merged.shift.view(L, T, r, 1)
    for t, part in enumerate(group.parts):
        weights[:, part].baddbmm_(b[:, t], a[:, t])
        biases[:, part].baddbmm_(b[:, t], shift[:, t])


def _merge_each(merged: _Merged, weight: Tensor, a: Tensor, shift: Tensor, b: Tensor) -> None:
    """Merge block by block and part by part in fp32."""
    n = b.shape[2]
    for row, linear in enumerate(merged.group.linears):
        assert isinstance(linear.weight, Tensor)
        for t, part in enumerate(merged.group.parts):
            rows = slice(part * n, (part + 1) * n)
            weight[row, rows] = linear.weight[rows].to(torch.float32, copy=True).addmm_(b[row, t], a[row, t])
            merged.bias[row, rows] = linear.bias[rows].to(torch.float32, copy=True).addmv_(b[row, t], shift[row, t])


def _entries(index: int, block: MergedBlock, entries: dict[tuple[int, str], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    norms = [p for norm in block.block.norms if norm is not None for p in (norm.weight, norm.bias)]
    return (*(t for name in block.adapters for t in entries[index, name]), *norms)
