"""sinkhorn, scored_sinkhorn and swapped_cross_entropy against plain torch, eager and compiled.

    pytest bench/kernels/bench_sinkhorn.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `eager` (SwAV's lines, in fp32), `compiled` (torch.compile of them) and ours. No time is given for a
variant whose result is wrong. A time is that of `calls` calls, the host's share included: it is what a step pays.
`ours each` is a call for each of two views, where `ours` is one for both; `apart` is the product, then `sinkhorn`. On a
GPU `graph` replays ours from a CUDA graph, which leaves the device's share, and `floor` moves the bytes that must
move (iterations + 1 reads, one write) with plain copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels import _dispatch, scored_sinkhorn
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.kernels.swapped_loss import swapped_cross_entropy

ON_GPU = torch.cuda.is_available()
SHAPES = ((128, 512), (2048, 3000), (4096, 8192)) if ON_GPU else ((128, 512), (256, 300))
DEVICE = "cuda" if ON_GPU else "cpu"
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1


def embeddings(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    z, c = (F.normalize(torch.randn(n, 128, generator=g), dim=1).to(DEVICE) for n in shape)
    return z, c


def scores_of(shape: tuple[int, int]) -> Tensor:
    z, c = embeddings(shape)
    return z @ c.T


def swav(scores: Tensor) -> Tensor:
    q = (scores / EPSILON).exp().T
    q /= q.sum()
    K, B = q.shape
    for _ in range(ITERATIONS):
        q /= q.sum(1, keepdim=True)
        q /= K
        q /= q.sum(0, keepdim=True)
        q /= B
    return (q * B).T


def eager_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (scores / TEMPERATURE).log_softmax(1)).sum(1).mean()


def with_backward(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    leaf = scores.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf, targets), leaf)[0]


def compiled(function: Callable) -> Callable:
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=DEVICE))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    return torch.compile(function)


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def floor(scores: Tensor) -> Callable[[], Tensor]:
    out = torch.empty_like(scores)

    def move() -> Tensor:
        # a sum reads once; a copy reads and writes
        for _ in range(ITERATIONS):
            scores.sum()
        return out.copy_(scores)

    return move


GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
EVERYWHERE = ("eager", pytest.param("compiled"), "ours")


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


@pytest.mark.parametrize("variant", ["eager", "apart", "ours", pytest.param("fused", marks=GPU_ONLY)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_scored_sinkhorn(measure, shape, variant):
    """From embeddings to scores and targets, and from the scores' gradient to the embeddings'."""
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
