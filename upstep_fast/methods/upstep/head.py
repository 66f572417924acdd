"""UpStep's projection head and prototypes at their initialization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.methods.losses import clustering


def make_head(config: AdaptConfig, width: int) -> nn.Module:
    """Build the projection head, [*, D] -> [*, d]. width: D, of the features."""
    if config.objective.head == "none":
        return nn.Identity()
    if config.objective.head == "linear":
        return nn.Linear(width, config.objective.head_dim)
    hidden = config.objective.head_hidden
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, config.objective.head_dim))


def make_prototypes(config: AdaptConfig, width: int) -> Tensor:
    """Return unit prototypes [K, d]; later replaced by k-means, or trained (prototype_init). width: d."""
    generator = torch.Generator().manual_seed(config.runtime.seed)
    if config.objective.prototype_init == "orthogonal":
        return clustering.orthogonal_prototypes(config.objective.prototypes, width, generator)
    return clustering.random_prototypes(config.objective.prototypes, width, generator)
