"""swapped_cross_entropy against plain torch, eager and compiled, forward and backward.

    pytest bench/kernels/bench_swapped_loss.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

No time is given for a variant whose result is wrong. A time is that of `calls` calls, the host's share included; on a
GPU `graph` replays ours from a CUDA graph, which leaves the device's share.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sinkhorn_inputs import (
    EPSILON,
    EVERYWHERE,
    GPU_ONLY,
    ITERATIONS,
    SHAPES,
    TEMPERATURE,
    compiled,
    graphed,
    scores_of,
)
from torch import Tensor

from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.kernels.swapped_loss import swapped_cross_entropy


def eager_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss in three lines of torch."""
    return -(targets * (scores / TEMPERATURE).log_softmax(1)).sum(1).mean()


def with_backward(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    leaf = scores.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf, targets), leaf)[0]


@pytest.mark.parametrize("variant", [*EVERYWHERE, pytest.param("graph", marks=GPU_ONLY)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_swapped_cross_entropy(measure, shape, variant):
    scores = scores_of(shape)
    targets = sinkhorn(scores, EPSILON, ITERATIONS)
    ours = with_backward(lambda s, q: swapped_cross_entropy(s, q, TEMPERATURE), scores, targets)
    call = {
        "eager": lambda: with_backward(eager_loss, scores, targets),
        "compiled": lambda: with_backward(compiled(eager_loss), scores, targets),
        "ours": lambda: ours,
        "graph": lambda: graphed(ours),
    }[variant]()
    expected = with_backward(eager_loss, scores.double(), targets.double())()
    torch.testing.assert_close(call().double(), expected, rtol=1e-3, atol=1e-9)
    measure(call, f"swapped_cross_entropy forward and backward {shape[0]}x{shape[1]}", "swapped_cross_entropy")
