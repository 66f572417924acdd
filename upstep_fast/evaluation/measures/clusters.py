"""Agreement of k-means clusters with the classes of images.

k-means (Lloyd 1982) from k-means++ (Arthur and Vassilvitskii 2007), once for each of SEEDS seeds: the best start by the
sum of squared distances changes with rounding, and its agreement by more than the interval. Each number is the mean
over the seeds. With n_ij images of class i in cluster j, a_i = sum_j n_ij, b_j = sum_i n_ij, n images in all:

    purity  1/n sum_j max_i n_ij
    NMI     2 I / (H(a) + H(b)),  I = 1/n sum_ij n_ij log(n n_ij / (a_i b_j)),  H(a) = -1/n sum_i a_i log(a_i / n)
    ARI     (s - e) / ((p + q) / 2 - e),  s = sum_ij C(n_ij, 2),  p = sum_i C(a_i, 2),  q = sum_j C(b_j, 2),
            e = p q / C(n, 2)                                                       (Hubert and Arabie 1985)

Purity is the share of images that are of their cluster's most frequent class, so its interval is an accuracy's. Without
one image of a cell, each sum above changes in one term: the jackknife's values cost nothing. It leaves the clusters as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upstep_fast.evaluation.intervals import SEEDS, Jackknife, Values

ITERATIONS = 100
TOLERANCE = 1e-4  # squared move of the centers, in variances of the features


@dataclass(frozen=True)
class Clusters:
    """Clusters of images."""

    of: Tensor  # [N] int64, 0 .. K - 1
    centers: Tensor  # [K, D] fp32
    inertia: float  # sum of squared distances to the centers


def cluster_scores(x: Tensor, y: Tensor) -> dict[str, Values]:
    """Return "purity" (right or not, [SEEDS, N] bool), "nmi" and "ari" of k-means clusters, as many as classes.

    x: [N, D] fp32; y: [N] int64 of at least two classes.
    """
    k = len(y.unique())
    runs = [agreement(kmeans(x, k, seed).of, y) for seed in range(SEEDS)]
    purity, *jackknives = zip(*(run.values() for run in runs), strict=True)
    nmi, ari = map(over_seeds, jackknives)
    return {"purity": torch.stack(purity), "nmi": nmi, "ari": ari}


def over_seeds(runs: Sequence[tuple[Tensor, Tensor]]) -> Jackknife:
    """Return the mean over seeds of a score and of its values without each image, [N]."""
    values, without = (torch.stack(parts) for parts in zip(*runs, strict=True))
    return Jackknife(float(values.mean()), without.mean(0), values)


def kmeans(x: Tensor, k: int, seed: int = 0) -> Clusters:
    """Return the clusters of one start of k-means. x: [N, D] fp32; k: at most N."""
    return lloyd(x, plus_plus(x, k, torch.Generator().manual_seed(seed)))


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Return k rows of x as centers [k, D], each drawn by its squared distance to those before."""
    squares = x.square().sum(1)
    indices = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = torch.full_like(squares, torch.inf)
    for _ in range(k - 1):
        new = x[indices[-1]]
        distance = torch.minimum(distance, (squares - 2 * (x @ new) + new.square().sum()).clamp_min(0))
        distance[indices[-1]] = 0
        # fewer distinct images than clusters leave nothing to draw by; multinomial takes 2^24 entries at most
        cumulated = distance.double().cumsum(0)
        point = cumulated[-1] * torch.rand(1, generator=generator, dtype=torch.float64)
        indices.append(min(int(torch.searchsorted(cumulated, point, right=True)), len(x) - 1))
    return x[indices]


def lloyd(x: Tensor, centers: Tensor) -> Clusters:
    """Move the centers to the means of their images until they rest; a center without images stays where it is."""
    tolerance = TOLERANCE * float(x.var(0, correction=0).mean())
    for _ in range(ITERATIONS):
        of, _ = _assign(x, centers)
        counts = torch.bincount(of, minlength=len(centers))[:, None]
        means = torch.zeros_like(centers).index_add_(0, of, x) / counts.clamp_min(1)
        moved = torch.where(counts > 0, means, centers)
        change, centers = float((moved - centers).square().sum()), moved
        if change <= tolerance:
            break
    of, inertia = _assign(x, centers)
    return Clusters(of, centers, inertia)


def _assign(x: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    """Return each image's nearest center and the sum of the squared distances."""
    offset, of, total = centers.square().sum(1), [], 0.0
    for block in x.split(4096):
        least = torch.addmm(offset, block, centers.T, alpha=-2).min(1)
        of.append(least.indices)
        total += float((least.values.double() + block.square().sum(1)).sum())
    return torch.cat(of), total


def agreement(clusters: Tensor, y: Tensor) -> dict[str, Any]:
    """Compare clusters with classes, [N] int64 each, N > 1.

    Returns "purity": right or not, [N] bool; "nmi" and "ari": the value and those without each image, [N], fp64.
    """
    k = int(clusters.max()) + 1
    cells, cell = torch.unique(y * k + clusters, return_inverse=True)
    of_cell = torch.bincount(cell)
    a, b = torch.bincount(y), torch.bincount(clusters)
    largest = torch.zeros(k, dtype=torch.int64).scatter_reduce(0, cells % k, of_cell, "amax")
    # of several most frequent classes one counts, the first
    is_largest = of_cell == largest[cells % k]
    first = torch.full((k,), len(a)).scatter_reduce(0, (cells % k)[is_largest], (cells // k)[is_largest], "amin")
    index = [counts[at].double() for counts, at in ((of_cell, cell), (a, y), (b, clusters))]
    totals = [counts.double() for counts in (of_cell, a, b)]
    return {
        "purity": first[clusters] == y,
        "nmi": _jackknife(_nmi, _xlogx, totals, index),
        "ari": _jackknife(_ari, _pairs, totals, index),
    }


def _jackknife(
    formula: Callable[..., Tensor], term: Callable[[Tensor], Tensor], totals: list[Tensor], counts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a formula of n and of the sums of a term over n_ij, a_i and b_j, and its values without each image, [N].

    totals: n_ij, a_i, b_j; counts: those of each image's cell, row and column, [N] each.
    """
    n = totals[1].sum()
    sums = [term(x).sum() for x in totals]
    without = [total + term(x - 1) - term(x) for total, x in zip(sums, counts, strict=True)]
    return formula(*sums, n), formula(*without, n - 1)


def _xlogx(x: Tensor) -> Tensor:
    return torch.special.xlogy(x, x)


def _pairs(x: Tensor) -> Tensor:
    return x * (x - 1) / 2


def _nmi(of_cells: Tensor, a: Tensor, b: Tensor, n: Tensor) -> Tensor:
    information = n.log() + (of_cells - a - b) / n
    entropies = 2 * n.log() - (a + b) / n
    return torch.where(entropies > 1e-12, 2 * information / entropies, 1.0)  # one class, one cluster: they agree


def _ari(s: Tensor, p: Tensor, q: Tensor, n: Tensor) -> Tensor:
    expected = p * q / _pairs(n)
    span = (p + q) / 2 - expected
    return torch.where(span.abs() > 1e-12, (s - expected) / span, 1.0)
