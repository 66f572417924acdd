"""Gradient caching: the forward and backward of a batch that memory does not hold at once, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_microbatches(features: Callable[[Tensor], Tensor], images: Tensor, num_microbatches: int) -> Tensor:
    """Return `features(images)`, [N, D], computed in `num_microbatches` parts of the N images.

    Values and gradients are those of one pass, memory is that of one part: the forward passes keep no activations, and
    backward computes each part again (GradCache, Gao et al. 2021). Losses over the whole batch, as Sinkhorn's and the
    center's, see all of it.
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
