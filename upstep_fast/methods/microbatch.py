"""A large batch in several passes of the model, when memory does not hold all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_passes(features: Callable[[Tensor], Tensor], images: Tensor, passes: int) -> Tensor:
    """`features(images)`, [B, D], in `passes` parts of the batch: the same values and gradients, of one part's memory.

    The forward passes keep nothing; in backward each part is computed again with what it needs for its gradient
    (GradCache, Gao et al. 2021). Losses over the whole batch, Sinkhorn's and the centre's, see all of it.
    """
    if passes == 1:
        return features(images)
    # autograd calls the backward of a function only where an input wants a gradient, which images do not
    anchor = torch.zeros((), device=images.device, requires_grad=True)
    parts = [
        checkpoint(lambda _, x: features(x), anchor, part, use_reentrant=True, preserve_rng_state=False)
        for part in images.chunk(passes)
    ]
    return torch.cat(parts)
