"""Frozen weights spread over the ranks (FSDP2)."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from upstep_fast.runtime import distributed


def shard(vit: nn.Module, device: torch.device) -> None:
    """Shard the frozen weights of `vit` over the ranks' devices, block by block (FSDP2), from the CPU.

    A block's weights are gathered while the block runs. Trained parameters are not sharded. No-op with one process.
    """
    if distributed.size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (distributed.size(),))
    trained = {p for p in vit.parameters() if p.requires_grad}
    for block in vit.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(vit, mesh=mesh, ignored_params=trained)
    for method in ("forward_features", "forward_head"):
        register_fsdp_forward_method(vit, method)
    # the class token is a view of the last block's output, which no code writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
