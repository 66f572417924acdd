"""Clustering with fixed prototypes: scores, Sinkhorn targets, swapped loss, center-vector regularization.

    z = u / |u|                      unit embeddings of V views of B images
    P_v = z_v C^T                    scores against K prototypes
    q_v = sinkhorn(P_v / eps)        targets, equal use of the prototypes within the batch, no gradient
    L = 1 / (V (V - 1)) sum_{v != w} -mean_b q_v . log softmax(P_w / tau)  +  cvr(s)

Shapes: V views, B images, d embedding dimension, K prototypes. Sources: SwAV (Caron et al. 2020) for scores, targets
and loss; fixed prototypes, equal-usage targets and these penalties are our reading of UpStep (METHODS 1.3 to 1.5).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels.swapped_loss import swapped_cross_entropy

Cvr = Literal["off", "sq", "norm", "anchor", "hinge", "ema"]
CVR_EMA_BETA = 0.9  # share of the running center in the "ema" penalty


def prototype_scores(z: Tensor, prototypes: Tensor) -> Tensor:
    """Compute the scores P = z C^T, [..., K], in fp32 or wider, under any autocast.

    z: unit embeddings [..., d]; prototypes: unit, [K, d]. Sinkhorn takes exp(P / epsilon) with epsilon = 0.05, so that
    rounding a cosine to bf16, by up to 2^-9, would change a target by up to 4 %.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        return z.to(wide) @ prototypes.to(wide).T


def swapped_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of each view with the targets of the other views (SwAV, eq. 1 and 2).

    scores: [V, B, K], V of at least 2; targets: [V, B, K], rows summing to 1, without gradient. Returns a scalar in
    fp32. The kernel stores no log-probabilities.
    """
    others = (targets.sum(0) - targets) / (len(targets) - 1)
    return swapped_cross_entropy(scores.flatten(0, 1), others.flatten(0, 1), temperature)


def one_sided_loss(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of one view with the targets of another. [B, K] each; a scalar in fp32."""
    return swapped_cross_entropy(scores, targets, temperature)


def disagreement(z: Tensor) -> Tensor:
    """Return 1 - mean_b z_1 . z_2, the distance between the two views of an image. z: [2, B, d], unit; a scalar."""
    return 1 - (z[0] * z[1]).sum(-1).mean()


def cvr_penalty(
    form: Cvr, center: Tensor, *, running_center: Tensor, base_center: Tensor, running_magnitude: Tensor
) -> Tensor:
    """Compute the center-vector regularization (METHODS 1.5; the paper's own formula is not published), a scalar.

    center: s [d], the batch's mean unit embedding, with gradient.
    off 0 | sq |s|^2 | norm |s| | anchor |s - s_base|^2 | hinge max(0, |s| - m)^2, m the running magnitude |
    ema |beta s_bar + (1 - beta) s|^2
    """
    if form == "sq":
        return center.square().sum()
    if form == "norm":
        return center.norm()
    if form == "anchor":
        return (center - base_center).square().sum()
    if form == "hinge":
        return F.relu(center.norm() - running_magnitude).square()
    if form == "ema":
        return (CVR_EMA_BETA * running_center + (1 - CVR_EMA_BETA) * center).square().sum()
    return center.new_zeros(())


def random_prototypes(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw Gaussian directions, centered so that their mean is 0, of unit length: [K, d] (METHODS 1.4).

    Equal-usage targets pull the mean embedding toward the mean prototype, so that mean must be 0.
    """
    c = torch.randn(num, width, generator=generator)
    for _ in range(8):  # centering and normalizing disturb one another; a few rounds bring the mean to 0
        c = F.normalize(c - c.mean(0), dim=-1)
    return c


def orthogonal_prototypes(num: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw orthonormal directions, [K, d] with K <= d; beyond d, further orthonormal sets follow."""
    sets = [torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(-(-num // width))]
    return torch.cat(sets)[:num].contiguous()


def spherical_kmeans(z: Tensor, num: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """Return K unit centers [K, d] of unit embeddings z [N, d], N >= K. Empty clusters restart at random."""
    initial = torch.randperm(len(z), generator=generator)[:num]
    c = z[initial.to(z.device)]
    for _ in range(iterations):
        nearest = (z @ c.T).argmax(1)
        sums = torch.zeros_like(c).index_add_(0, nearest, z)
        empty = torch.bincount(nearest, minlength=num) == 0
        restart = z[torch.randint(len(z), (num,), generator=generator).to(z.device)]
        c = F.normalize(torch.where(empty[:, None], restart, sums), dim=-1)
    return c
