"""sinkhorn and swapped_cross_entropy against plain torch, eager and compiled.

    pytest bench/bench_sinkhorn.py --benchmark-only --benchmark-group-by=group --benchmark-json=FILE

In one group: `eager` (SwAV's lines, in fp32), `compiled` (torch.compile of them) and ours. No time is given for a
variant whose result is wrong. A time is that of `calls` calls, the host's share included: it is what a step pays.
On a GPU `graph` replays ours from a CUDA graph, which leaves the device's share, and `floor` moves the bytes that must
move (iterations + 1 reads, one write) with plain copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.sinkhorn import sinkhorn
from upstep_fast.kernels.swapped_loss import swapped_cross_entropy

ON_GPU = torch.cuda.is_available()
SHAPES = ((128, 512), (2048, 3000), (4096, 8192)) if ON_GPU else ((128, 512), (256, 300))
DEVICE, CALLS = ("cuda", 20) if ON_GPU else ("cpu", 1)
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1


def scores_of(shape: tuple[int, int]) -> Tensor:
    g = torch.Generator().manual_seed(0)
    z, c = (F.normalize(torch.randn(n, 128, generator=g), dim=1) for n in shape)
    return (z @ c.T).to(DEVICE)


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


def measure(benchmark, call: Callable[[], object], label: str) -> None:
    def repeated() -> None:
        for _ in range(CALLS):
            call()
        if ON_GPU:
            torch.cuda.synchronize()

    rows = [row.implementation for row in _dispatch.report() if row.op in ("sinkhorn", "swapped_cross_entropy")]
    benchmark.extra_info.update(
        calls=CALLS, device=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__, ran=rows
    )
    benchmark.name = label
    benchmark.pedantic(repeated, warmup_rounds=3, rounds=20)


GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
EVERYWHERE = ("eager", pytest.param("compiled"), "ours")


@pytest.mark.parametrize(
    "variant",
    [*EVERYWHERE, pytest.param("graph", marks=GPU_ONLY), pytest.param("floor", marks=GPU_ONLY)],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.benchmark(group="sinkhorn")
def test_sinkhorn(benchmark, shape, variant):
    scores = scores_of(shape)
    benchmark.group = f"sinkhorn {shape[0]}x{shape[1]}"
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
    measure(benchmark, call, variant)


@pytest.mark.parametrize("variant", [*EVERYWHERE, pytest.param("graph", marks=GPU_ONLY)])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_swapped_cross_entropy(benchmark, shape, variant):
    scores = scores_of(shape)
    targets = sinkhorn(scores, EPSILON, ITERATIONS)
    benchmark.group = f"swapped_cross_entropy forward and backward {shape[0]}x{shape[1]}"
    ours = with_backward(lambda s, q: swapped_cross_entropy(s, q, TEMPERATURE), scores, targets)
    call = {
        "eager": lambda: with_backward(eager_loss, scores, targets),
        "compiled": lambda: with_backward(compiled(eager_loss), scores, targets),
        "ours": lambda: ours,
        "graph": lambda: graphed(ours),
    }[variant]()
    expected = with_backward(eager_loss, scores.double(), targets.double())()
    torch.testing.assert_close(call().double(), expected, rtol=1e-3, atol=1e-9)
    measure(benchmark, call, variant)
