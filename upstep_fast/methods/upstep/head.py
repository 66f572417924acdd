"""UpStep's head and prototypes as they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.losses import clustering


def make_head(config: AdaptConfig, width: int) -> nn.Module:
    """The projection head: [*, D] -> [*, d]."""
    if config.objective.head == "none":
        return nn.Identity()
    if config.objective.head == "linear":
        return nn.Linear(width, config.objective.head_dim)
    hidden = config.objective.head_hidden
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, config.objective.head_dim),
    )


def make_prototypes(config: AdaptConfig, num: int, width: int) -> Tensor:
    """Unit prototypes [K, d]; k-means replaces them once it has seen the data, learned ones start from these."""
    generator = torch.Generator().manual_seed(config.runtime.seed)
    if config.objective.prototype_init == "orthogonal":
        return clustering.orthogonal_prototypes(num, width, generator)
    return clustering.random_prototypes(num, width, generator)
