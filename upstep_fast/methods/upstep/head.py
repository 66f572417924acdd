"""UpStep's head and prototypes as they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.losses import clustering


def make_head(config: AdaptConfig, width: int) -> nn.Module:
    """The projection head: [*, D] -> [*, d]."""
    if config.head == "none":
        return nn.Identity()
    if config.head == "linear":
        return nn.Linear(width, config.head_dim)
    return nn.Sequential(
        nn.Linear(width, config.head_hidden), nn.GELU(), nn.Linear(config.head_hidden, config.head_dim)
    )


def make_prototypes(config: AdaptConfig, num: int, width: int) -> Tensor:
    """Unit prototypes [K, d]; k-means replaces them once it has seen the data, learned ones start from these."""
    generator = torch.Generator().manual_seed(config.seed)
    if config.prototype_init == "orthogonal":
        return clustering.orthogonal_prototypes(num, width, generator)
    return clustering.random_prototypes(num, width, generator)
