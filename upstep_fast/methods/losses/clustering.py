"""Clustering with fixed prototypes: scores, Sinkhorn targets, swapped loss, centre-vector regularisation.

    z = u / |u|                      unit embeddings of V views of B images
    P_v = z_v C^T                    scores against K prototypes
    q_v = sinkhorn(P_v / eps)        targets, equal use of the prototypes within the batch, no gradient
    L = 1 / (V (V - 1)) sum_{v != w} -mean_b q_v . log softmax(P_w / tau)  +  cvr(s)

Shapes: V views, B images, d clustering width, K prototypes. Sources: SwAV (Caron et al. 2020) for scores, targets and
loss; that UpStep uses fixed centres, equal-usage targets and these penalties is our reading (METHODS 1.3 to 1.5).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels.swapped_loss import swapped_cross_entropy

Cvr = Literal["off", "sq", "norm", "anchor", "hinge", "ema"]
CVR_EMA_BETA = 0.9  # share of the running centre in the "ema" penalty


def swapped_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Each view predicts the targets of the others (SwAV, eq. 1 and 2), the mean of them at once.

    scores: [V, B, K]; targets: [V, B, K], rows summing to 1; returns a scalar in fp32. V of at least 2.
    The kernel stores no log-probabilities. Targets carry no gradient.
    """
    others = (targets.sum(0) - targets) / (len(targets) - 1)
    return swapped_cross_entropy(scores.flatten(0, 1), others.flatten(0, 1), temperature)


def one_sided_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The learning view predicts the targets of the other. scores, targets: [B, K]; returns a scalar in fp32."""
    return swapped_cross_entropy(scores, targets, temperature)


def disagreement(z: Tensor) -> Tensor:
    """1 - mean_b z_1 . z_2, how far apart the two views of an image lie; z: [2, B, d] of unit length. A scalar."""
    return 1 - (z[0] * z[1]).sum(-1).mean()


def cvr_penalty(
    form: Cvr, centre: Tensor, *, running_centre: Tensor, base_centre: Tensor, running_magnitude: Tensor
) -> Tensor:
    """Centre-vector regularisation (METHODS 1.5; the paper's own formula is not published).

    centre: [d], the batch's mean unit embedding, with gradient. Returns a scalar.
    off 0 | sq |s|^2 | norm |s| | anchor |s - s_base|^2 | hinge max(0, |s| - m)^2, m the running magnitude |
    ema |beta s_bar + (1 - beta) s|^2
    """
    if form == "sq":
        return centre.square().sum()
    if form == "norm":
        return centre.norm()
    if form == "anchor":
        return (centre - base_centre).square().sum()
    if form == "hinge":
        return F.relu(centre.norm() - running_magnitude).square()
    if form == "ema":
        return (CVR_EMA_BETA * running_centre + (1 - CVR_EMA_BETA) * centre).square().sum()
    return centre.new_zeros(())


def random_prototypes(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Gaussian directions, centred so that their mean is 0, of unit length: [K, d] (METHODS 1.4).

    Equal-usage targets pull the mean embedding toward the mean prototype, so that mean must be 0.
    """
    c = torch.randn(num, width, generator=generator)
    for _ in range(8):  # centring and normalising disturb one another; a few rounds bring the mean to 0
        c = F.normalize(c - c.mean(0), dim=-1)
    return c


def orthogonal_prototypes(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions, [K, d] with K <= d; beyond d, further orthonormal sets follow."""
    sets = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(-(-num // width))]
    return torch.cat(sets)[:num].contiguous()


def kmeans_prototypes(z: Tensor, num: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Spherical k-means of unit embeddings z [N, d], N >= K: [K, d] unit centres. Empty clusters restart at random."""
    chosen = torch.randperm(len(z), generator=generator)[:num]
    c = z[chosen.to(z.device)]
    for _ in range(iterations):
        nearest = (z @ c.T).argmax(1)
        sums = torch.zeros_like(c).index_add_(0, nearest, z)
        empty = torch.bincount(nearest, minlength=num) == 0
        restart = z[torch.randint(len(z), (num,), generator=generator).to(z.device)]
        c = F.normalize(torch.where(empty[:, None], restart, sums), dim=-1)
    return c
