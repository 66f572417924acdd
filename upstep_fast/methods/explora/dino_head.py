"""DINO's head (Caron et al. 2021), from scratch: DINOv2's own are not published."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """DINO's head, [*, D] -> [*, K]: an MLP of three layers, a bottleneck, cosines with K prototypes."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # DINOv2 truncates it at 100 standard deviations
                nn.init.zeros_(module.bias)
        # of unit length in use: weight normalization with its length fixed at 1
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / bottleneck**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores [*, K] of x [*, D], each a cosine."""
        return F.linear(F.normalize(self.mlp(x), dim=-1, eps=1e-6), F.normalize(self.prototypes, dim=-1).to(x.dtype))


def scores(head: Head, patch_head: Head | None, classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [*, K] and [M, K] of class tokens [*, D] and patches [M, D]. A head for both runs once."""
    if patch_head is not None:
        return head(classes), patch_head(patches)
    flat = classes.flatten(0, -2)
    class_scores, patch_scores = head(torch.cat([flat, patches])).split([len(flat), len(patches)])
    return class_scores.view(*classes.shape[:-1], -1), patch_scores
