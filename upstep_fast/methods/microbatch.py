"""Gradient caching: a batch that memory does not hold at once, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_microbatches(features: Callable[[Tensor], Tensor], images: Tensor, num_microbatches: int) -> Tensor:
    """`features(images)`, [B, D], computed in `num_microbatches` parts of the batch.

    The values and gradients are those of one pass; the memory is that of one part.

    The forward passes keep nothing; in backward each part is computed again with what it needs for its gradient
    (GradCache, Gao et al. 2021). Losses over the whole batch, Sinkhorn's and the centre's, see all of it.
    """
    if num_microbatches == 1:
        return features(images)
    # autograd calls the backward of a function only where an input wants a gradient, which images do not
    anchor = torch.zeros((), device=images.device, requires_grad=True)
    parts = [
        checkpoint(lambda _, x: features(x), anchor, part, use_reentrant=True, preserve_rng_state=False)
        for part in images.chunk(num_microbatches)
    ]
    return torch.cat(parts)
