"""What a step's forward pass leaves: unit embeddings, their centre, and what the gate looks at.

z = u / |u|;  S_v = sum_i z_vi, added up over the ranks;  s = sum_v S_v / (V B);  m = |s|    kernels/center_vector
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from upstep_fast.kernels.center_vector import center_vector_partial
from upstep_fast.runtime import distributed


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of V views of B images and their centre."""

    z: Tensor  # [V, B, d] fp32, unit length
    centre: Tensor  # [d] fp32, mean of z; carries gradient where z does
    of_views: Tensor  # [V, d] fp32, detached: the sum of each view's z
    magnitudes: Tensor  # [1 + V] or one more, fp32, detached: |centre|, of each view's centre, `statistic`
    views: Tensor | None = None  # [V, B, C, H, W], where the loss wants the base model's features of them
    features: Tensor | None = None  # [V B, D] with gradient, where the loss looks at them
    local: Tensor | None = None  # [n, B, C, h, w], small views that only the loss embeds
    chosen: Tensor | None = None  # [b] int64, of target views: the images whose other view learns; None: all
    statistic: Callable[[Tensor], Tensor] | None = None  # z -> what the gate looks at instead of the centre, a scalar

    @property
    def local_stats(self) -> Tensor:
        """What is added up over the ranks: the sum of each view's z, and the images. [V d + 1] fp32, detached."""
        return torch.cat([self.of_views.flatten(), self.of_views.new_full((1,), self.z.shape[1])])

    def with_global_stats(self, stats: Tensor) -> Self:
        """The same z with the centre of all ranks' images; `stats`: the `local_stats` of all ranks together.

        The centre's value is that of the whole batch and its gradient that of the own images' mean, so the mean over
        the ranks of a loss of it, and of the loss's gradients, is what one process with the whole batch would have.
        """
        of_views = stats[:-1].view(len(self.z), -1) / stats[-1]
        whole, own = of_views.mean(0), self.centre
        magnitudes = torch.cat([whole.norm()[None], of_views.norm(dim=-1)])
        if self.statistic:  # a mean over images, of which every rank has as many
            value = distributed.reduce(self.statistic(self.z.detach())) / distributed.size()
            magnitudes = torch.cat([magnitudes, value[None]])
        return replace(self, centre=whole + (own - own.detach()), magnitudes=magnitudes)

    def detach(self) -> Self:
        """The same without gradients: nothing kept for a backward pass outlives a closed gate."""
        return replace(self, z=self.z.detach(), centre=self.centre.detach(), views=None, features=None, local=None)


def embedded(u: Tensor) -> Embeddings:
    """What the head makes of V views, u [V, B, d], as unit embeddings with their centre, of one rank."""
    z, sums, _ = center_vector_partial(u.flatten(0, 1), num_views=len(u))
    of_views = sums[:-2].view(len(u), -1)
    centre = (of_views.sum(0) / len(z)).float()
    magnitudes = torch.cat([centre.detach()[None], of_views.detach().float() / u.shape[1]]).norm(dim=-1)
    return Embeddings(z.view_as(u), centre, of_views.detach().float(), magnitudes)
