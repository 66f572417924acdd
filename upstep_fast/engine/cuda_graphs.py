"""The engine's forward and backward of a training step as two CUDA graphs: one launch each in place of a thousand.

    captured once a shape of images:  f = features(x);  dL/dA, dL/dB, ... from dL/df
    every step:                       x, dL/df copied to where the graphs read them; replayed

The graphs read weights and adapters where they lie, so optimizers and checkpoints must write them in place, as ours do.
What the forward keeps stays in the graphs' memory: one backward at most for each forward, before the next one. A step
that its gate closes replays the forward alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Features(nn.Module):
    # make_graphed_callables asks a module for the parameters that get gradients
    def __init__(self, vit: nn.Module, features: Callable[[Tensor], Tensor]):
        super().__init__()
        self.vit, self.features = vit, features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)


def graphed(
    vit: nn.Module, features: Callable[[Tensor], Tensor], check_unchanged: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """`features` on a GPU, replayed where gradients are wanted; the same values and gradients, bit for bit.

    vit: holds all that `features` trains. check_unchanged: called before a replay, which runs none of its own checks.
    The first call with images of a new shape takes some more passes, and the graphs hold their memory from then on.
    """
    captured: dict[tuple[torch.Size, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def call(images: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return features(images)
        check_unchanged()
        key = images.shape, images.dtype
        with torch.autocast(images.device.type, enabled=False, cache_enabled=False):  # the engine sets its own types
            if key not in captured:
                # the graph reads its images from this copy, ever after
                module = _Features(vit, features)
                captured[key] = torch.cuda.make_graphed_callables(module, (images.clone(),))  # type: ignore[assignment]
            return captured[key](images)

    return call
