"""UpStep's objective in the fewest lines of plain torch, in whatever precision it is given.

Nothing here is fast, and nothing is shared with the code that is: two independent writings of one formula check one
another. Formula: methods/losses/clustering.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Targets q [B, K] from scores [B, K]: alternately every prototype and every sample sums to its share."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q.exp()


def upstep_loss(
    u: Tensor, prototypes: Tensor, *, epsilon: float, iterations: int, temperature: float, cvr_weight: float
) -> Tensor:
    """Swapped loss and squared center: u [V, B, d] head outputs, prototypes [K, d] unit rows; returns a scalar."""
    z = u / u.norm(dim=-1, keepdim=True)
    num_views, num_images = z.shape[:2]
    loss = torch.zeros((), dtype=u.dtype, device=u.device)
    for teacher in range(num_views):
        q = sinkhorn((z[teacher] @ prototypes.T).detach(), epsilon, iterations)
        for student in range(num_views):
            if student != teacher:
                p = (z[student] @ prototypes.T / temperature).softmax(-1)
                for b in range(num_images):
                    loss = loss - (q[b] * p[b].log()).sum() / num_images
    center = z.reshape(-1, z.shape[-1]).mean(0)
    return loss / (num_views * (num_views - 1)) + cvr_weight * center @ center
