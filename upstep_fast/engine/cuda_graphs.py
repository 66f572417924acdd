"""The engine's forward and backward of a training step as two CUDA graphs: one launch each instead of a thousand.

    captured once per image shape:  f = features(x);  dL/dA, dL/dB, ... from dL/df
    every step:                     copy x and dL/df to the graphs' inputs, replay

The graphs read weights and adapters at fixed addresses, so optimizers and checkpoints must write them in place, as ours
do. Saved tensors stay in the graphs' memory: at most one backward per forward, before the next forward. A step that the
gate skips replays the forward only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from upstep_fast.model.pooling import FeatureExtractor


def graphed(
    vit: nn.Module, features: Callable[[Tensor], Tensor], check_unchanged: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """Return `features` on a GPU, replayed as CUDA graphs where gradients are needed, bit for bit equal.

    vit: holds all parameters that `features` trains. check_unchanged: called before a replay, which skips the checks
    inside `features`. The first call with a new image shape runs a few more passes; the graphs keep their memory.
    """
    captured: dict[tuple[torch.Size, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def call(images: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return features(images)
        check_unchanged()
        key = images.shape, images.dtype
        with torch.autocast(images.device.type, enabled=False, cache_enabled=False):  # the engine sets its own types
            if key not in captured:
                # a module, which make_graphed_callables asks for the parameters that get gradients
                module = FeatureExtractor(vit, features)
                # the graph reads its images from the copy at every replay
                captured[key] = torch.cuda.make_graphed_callables(module, (images.clone(),))  # type: ignore[assignment]
            return captured[key](images)

    return call
