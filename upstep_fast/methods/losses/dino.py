"""DINOv2's losses: class tokens (DINO), masked patches (iBOT), spread (KoLeo), and the teacher's targets.

    p = softmax(t / tau_t - c), or Sinkhorn of t at tau_t                                targets of the teacher's scores
    DINO   mean over pairs of views v != w of  -mean_b sum_k p_w[b] log softmax(s_v[b] / tau_s)
    iBOT   mean over images of the mean over their masked patches of  -sum_k p log softmax(s / tau_s)
    KoLeo  -mean_i log |x_i - x_nearest(i)|,  x of unit length                           Kozachenko-Leonenko

s: the student's scores against K prototypes, t: the teacher's. Sources: DINO (Caron et al. 2021), iBOT (Zhou et al.
2022), KoLeo (Sablayrolles et al. 2019), all as DINOv2's code combines them (facebookresearch/dinov2, loss/).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8  # of KoLeo's distances and norms


def softmax_targets(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return softmax((t - c) / tau), [M, K] fp32; centering prevents collapse to one prototype.

    scores: t [M, K]; center: c [K].
    """
    return F.softmax((scores.float() - center) / temperature, dim=-1)


def class_token_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Compute DINO's loss: each of the student's views predicts the targets of every other view.

    student: [V, B, K] scores, its first G views those that made `targets` [G, B, K]. Returns a scalar in fp32: the mean
    over the V G - G pairs of different views, as DINOv2 weights global and local crops. Without local crops DINOv2's
    code divides by one pair more than there are (max(2 n, 1) for n local crops): its loss is 2/3 of this mean.
    """
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    num_views, num_global = len(student), len(targets)
    # sum over all pairs, less the pairs of a view with itself
    all_pairs = (targets.sum(0) * log_p.sum(0)).sum(-1)
    own_pairs = (targets * log_p[:num_global]).sum((0, 2))
    return -(all_pairs - own_pairs).mean() / (num_global * (num_views - 1))


def patch_loss(student: Tensor, targets: Tensor, weights: Tensor, num_images: int, temperature: float) -> Tensor:
    """Compute iBOT's loss on the masked patches of a batch.

    student, targets: [M, K]; weights: [M], 1 / (masked patches of the patch's image). Returns a scalar in fp32: the
    sum over patches over `num_images`, images without a masked patch counted, as DINOv2 does.
    """
    cross_entropy = -(targets * F.log_softmax(student.float() / temperature, dim=-1)).sum(-1)
    return (cross_entropy * weights).sum() / num_images


def koleo(x: Tensor) -> Tensor:
    """Return -mean log of each feature's distance to its nearest neighbor, a scalar in fp32. x: [B, D], B >= 2."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=EPS)
        with torch.no_grad():
            similarity = x @ x.T
            nearest = similarity.fill_diagonal_(-1).argmax(1)
        return -((x - x[nearest] + EPS).norm(dim=-1) + EPS).log().mean()


def entropy(p: Tensor) -> Tensor:
    """Return the mean entropy of the rows of p [M, K], as a fraction of the largest, ln K; 1: all rows uniform."""
    return torch.special.entr(p).sum(-1).mean() / torch.log(torch.tensor(float(p.shape[-1])))
