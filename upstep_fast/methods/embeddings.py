"""Unit embeddings of a step's views and their center vector, over one rank or all.

z = u / |u|;  S_v = sum_i z_vi, summed over the ranks;  s = sum_v S_v / (V B);  m = |s|    kernels/center_vector
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from upstep_fast.kernels.center_vector import center_vector_partial

Extras = TypeVar("Extras")
WITHOUT_FLOAT64 = ("mps",)  # types of devices


@dataclass(frozen=True)
class Embeddings(Generic[Extras]):
    """Embeddings of V views of B images, their center vector, and what the method's loss needs besides."""

    z: Tensor  # [V, B, d] fp32, unit length
    center: Tensor  # [d] fp32, mean of z; carries gradient where z does
    view_sums: Tensor  # [V, d] fp32, detached: sum of z over this rank's images
    magnitudes: Tensor  # [1 + V] fp32, detached: |center|, then |center| of each view; the gate's statistics
    extras: Extras  # of the method; None where the loss needs nothing besides

    @property
    def local_stats(self) -> Tensor:
        """Sums of each view's z over this rank's images, and their number B: [V d + 1] fp32, detached."""
        return torch.cat([self.view_sums.flatten(), self.view_sums.new_full((1,), self.z.shape[1])])

    def with_global_stats(self, stats: Tensor) -> Embeddings[Extras]:
        """Return the embeddings with the center vector of all ranks' images.

        stats: `local_stats` summed over the ranks.
        The center's value is that of the whole batch, its gradient that of the local images' mean. So the mean over
        the ranks of a loss of it, and of the loss's gradients, is what one process with the whole batch would have.
        """
        view_centers = stats[:-1].view(len(self.z), -1) / stats[-1]
        center = view_centers.mean(0)
        magnitudes = torch.cat([center.norm()[None], view_centers.norm(dim=-1)])
        return replace(self, center=center + (self.center - self.center.detach()), magnitudes=magnitudes)

    def detach(self) -> Embeddings[None]:
        """Return the embeddings without gradients and extras, so that a skipped step keeps no activations."""
        return Embeddings(self.z.detach(), self.center.detach(), self.view_sums, self.magnitudes, None)


def unit_embeddings(u: Tensor, extras: Extras = None) -> Embeddings[Extras]:  # type: ignore[assignment]
    """Normalize a head's outputs u [V, B, d] to unit length and compute their center vector over this rank's images."""
    rows, on_host = u.flatten(0, 1), u.device.type in WITHOUT_FLOAT64  # which the sums are in
    z, sums, _ = center_vector_partial(rows.cpu() if on_host else rows, num_views=len(u))
    if on_host:
        z, sums = z.to(u.device), sums.float().to(u.device)
    view_sums = sums[:-2].view(len(u), -1)
    center = (view_sums.sum(0) / len(z)).float()
    magnitudes = torch.cat([center.detach()[None], view_sums.detach().float() / u.shape[1]]).norm(dim=-1)
    return Embeddings(z.view_as(u), center, view_sums.detach().float(), magnitudes, extras)
