"""sinkhorn against plain torch, eager and compiled.

    pytest bench/kernels/bench_sinkhorn.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `eager` (SwAV's lines, in fp32), `compiled` (torch.compile of them) and ours. No time is given for a
variant whose result is wrong. A time is that of `calls` calls, the host's share included: it is what a step pays.
`ours each` is a call for each of two views, where `ours` is one for both. On a GPU `graph` replays ours from a CUDA
graph, which leaves the device's share, and `floor` moves the bytes that must move (iterations + 1 reads, one write)
with plain copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sinkhorn_inputs import EPSILON, EVERYWHERE, GPU_ONLY, ITERATIONS, SHAPES, compiled, graphed, scores_of, swav
from torch import Tensor

from upstep_fast.kernels.sinkhorn import sinkhorn


def floor(scores: Tensor) -> Callable[[], Tensor]:
    """Move the bytes that must move, with plain copies."""
    out = torch.empty_like(scores)

    def move() -> Tensor:
        # a sum reads once; a copy reads and writes
        for _ in range(ITERATIONS):
            scores.sum()
        return out.copy_(scores)

    return move


@pytest.mark.parametrize(
    "variant",
    [*EVERYWHERE, pytest.param("graph", marks=GPU_ONLY), pytest.param("floor", marks=GPU_ONLY)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sinkhorn(measure, shape, variant):
    scores = scores_of(shape)
    ours = lambda: sinkhorn(scores, EPSILON, ITERATIONS)  # noqa: E731
    call = {
        "eager": lambda: lambda: swav(scores),
        "compiled": lambda: (lambda run: lambda: run(scores))(compiled(swav)),
        "ours": lambda: ours,
        "graph": lambda: graphed(ours),
        "floor": lambda: floor(scores),
    }[variant]()
    if variant != "floor":
        torch.testing.assert_close(call().double(), swav(scores.double()), rtol=1e-4, atol=1e-9)
    measure(call, f"sinkhorn {shape[0]}x{shape[1]}", "sinkhorn")


@pytest.mark.parametrize("variant", ["ours", "ours each"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_sinkhorn_of_two_views(measure, shape, variant):
    scores = torch.stack([scores_of(shape), -scores_of(shape)])
    together = lambda: sinkhorn(scores, EPSILON, ITERATIONS)  # noqa: E731
    each = lambda: torch.stack([sinkhorn(view, EPSILON, ITERATIONS) for view in scores])  # noqa: E731
    torch.testing.assert_close(together(), each(), rtol=1e-4, atol=1e-9)
    measure(together if variant == "ours" else each, f"sinkhorn 2x{shape[0]}x{shape[1]}", "sinkhorn")
