"""The engine's forward and backward of a training step as two CUDA graphs: one launch each instead of a thousand.

    captured once per image shape:  f = features(x);  dL/dA, dL/dB, ... from dL/df
    every step:                     copy x and dL/df to the graphs' inputs, replay

The graphs read weights and adapters at fixed addresses, so optimizers and checkpoints must write them in place, as ours
do. Saved tensors stay in the graphs' memory: at most one backward per forward, before the next forward. A step that the
gate skips replays the forward only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WARM_UP = 3  # passes before the capture: what is chosen, compiled or allocated once must not be part of it


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
                trained = [p for p in vit.parameters() if p.requires_grad]
                captured[key] = capture(features, images.clone(), trained)
            return captured[key](images)

    return call


def capture(
    features: Callable[[Tensor], Tensor], place: Tensor, trained: Sequence[nn.Parameter]
) -> Callable[[Tensor], Tensor]:
    """Capture `features` and its backward, and return a function that replays them: images -> features [B, D].

    place: images, from where the graph reads them at every replay. trained: parameters that get gradients. Unlike
    torch.cuda.make_graphed_callables, whose error mode torch 2.11 fixes to "global", the capture does not fail if
    another thread, as in prefetching, allocates; and gradients are copies, which the next replay does not overwrite.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            output = features(place)
            torch.autograd.grad(output, trained, torch.empty_like(output))
            del output
    torch.cuda.synchronize()
    how: dict[str, Any] = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
    forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, **how):
        output = features(place)
    gradient = torch.empty_like(output)
    with torch.cuda.graph(backward, **how):
        gradients = torch.autograd.grad(output, trained, gradient)

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, images: Tensor, *parameters: Tensor) -> Tensor:
            place.copy_(images)
            forward.replay()
            return output.detach()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
            gradient.copy_(incoming)
            backward.replay()
            return None, *(g.clone() for g in gradients)

    return lambda images: Replay.apply(images, *trained)
