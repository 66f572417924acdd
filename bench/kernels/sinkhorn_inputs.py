"""Inputs of the benchmarks of sinkhorn, scored_sinkhorn and swapped_loss, and the variants that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

ON_GPU = torch.cuda.is_available()
SHAPES = ((128, 512), (2048, 3000), (4096, 8192)) if ON_GPU else ((128, 512), (256, 300))
DEVICE = "cuda" if ON_GPU else "cpu"
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1
GPU_ONLY = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
EVERYWHERE = ("eager", "compiled", "ours")


def embeddings(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return unit embeddings and centers, [B, 128] and [K, 128]."""
    g = torch.Generator().manual_seed(0)
    z, c = (F.normalize(torch.randn(n, 128, generator=g), dim=1).to(DEVICE) for n in shape)
    return z, c


def scores_of(shape: tuple[int, int]) -> Tensor:
    """Return scores [B, K]."""
    z, c = embeddings(shape)
    return z @ c.T


def swav(scores: Tensor) -> Tensor:
    """Compute the targets by SwAV's lines."""
    q = (scores / EPSILON).exp().T
    q /= q.sum()
    K, B = q.shape
    for _ in range(ITERATIONS):
        q /= q.sum(1, keepdim=True)
        q /= K
        q /= q.sum(0, keepdim=True)
        q /= B
    return (q * B).T


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function`, or skip the benchmark where torch.compile does not work."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=DEVICE))
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    return torch.compile(function)


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture `call` in a CUDA graph; returns its replay."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
