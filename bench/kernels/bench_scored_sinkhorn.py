"""scored_sinkhorn against a product and plain torch, and against a product and `sinkhorn`.

    pytest bench/kernels/bench_scored_sinkhorn.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `eager` (SwAV's lines, in fp32), `apart` (the product, then `sinkhorn`), ours, and on a GPU the fused
form. No time is given for a variant whose result is wrong. A time is that of `calls` calls, the host's share included.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sinkhorn_inputs import EPSILON, GPU_ONLY, ITERATIONS, SHAPES, embeddings, swav
from torch import Tensor

from upstep_fast.kernels import _dispatch, scored_sinkhorn
from upstep_fast.kernels.sinkhorn import sinkhorn


@pytest.mark.parametrize("variant", ["eager", "apart", "ours", pytest.param("fused", marks=GPU_ONLY)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_scored_sinkhorn(measure, shape, variant):
    """Time embeddings to scores and targets, and the scores' gradient to the embeddings'."""
    z, c = embeddings(shape)
    z.requires_grad_()

    def of(targets: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        scores = z @ c.T
        return scores, targets(scores.detach())

    forward = {
        "eager": lambda: of(swav),
        "apart": lambda: of(lambda scores: sinkhorn(scores, EPSILON, ITERATIONS)),
    }.get(variant, lambda: scored_sinkhorn(z, c, EPSILON, ITERATIONS))

    def both() -> tuple[Tensor, Tensor]:
        scores, targets = forward()
        return targets, torch.autograd.grad(scores, z, targets)[0]

    with _dispatch.forced("triton" if variant == "fused" else None):
        wanted = swav((z @ c.T).detach().double())
        targets, gradient = both()
        torch.testing.assert_close(targets.double(), wanted, rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(gradient.double(), wanted @ c.double(), rtol=1e-3, atol=1e-6)
        measure(both, f"scored_sinkhorn forward and backward {shape[0]}x{shape[1]}", "scored_sinkhorn")
