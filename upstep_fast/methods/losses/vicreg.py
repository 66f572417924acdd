"""Variance, invariance and covariance of two views' embeddings (VICReg, Bardes et al. 2022, arXiv 2105.04906).

For embeddings U, U' [B, d], not normalized, with the weights (25, 25, 1) of the paper:

    invariance   mean (U - U')^2
    variance     mean_j max(0, 1 - sqrt(var(U_j) + 1e-4))            half of it for each view
    covariance   sum_{i != j} cov(U)_ij^2 / d                        of both views
    L = 25 invariance + 25 variance + covariance

As in the authors' code, where the invariance is a mean over the dimensions too (the paper's equation 4 has their sum).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0
_EPSILON = 1e-4


def vicreg_loss(student: Tensor, target: Tensor) -> Tensor:
    """Return the loss of two views, a scalar in fp32 or wider. student, target: [B, d], B of at least 2.

    A `target` without gradient (layout asymmetric) counts for the invariance alone.
    """
    student, target = _wide(student), _wide(target)
    moments = [_moments(u) for u in (student, target) if u.requires_grad or u is student]
    variance = torch.stack([v for v, _ in moments]).mean()
    covariance = torch.stack([c for _, c in moments]).sum()
    return INVARIANCE * F.mse_loss(student, target) + VARIANCE * variance + COVARIANCE * covariance


def _wide(u: Tensor) -> Tensor:
    return u.to(torch.promote_types(u.dtype, torch.float32))


def _moments(u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance term and the covariance term of embeddings [B, d], scalars."""
    centered = u - u.mean(0)
    variances = centered.square().sum(0) / (len(u) - 1)
    with torch.autocast(u.device.type, enabled=False):
        covariance = centered.T @ centered / (len(u) - 1)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - (variances + _EPSILON).sqrt()).mean(), off_diagonal / u.shape[1]
