"""How good features are, judged without a label: pure functions of features, and one set of scores for a run.

    x, y      [N, D]  features of the same N images by two models, or of two views by one model; unit length unless
                      a function says otherwise. Scores are Python floats, computed in float64.

    effective rank          exp H(p), p = singular values / their sum      Roy and Vetterli 2007; RankMe, Garrido 2023
    alignment, uniformity   E |x - y|^2;  log E exp(-2 |x_i - x_j|^2)      Wang and Isola 2020
    occupancy               exp H(share of each cluster) / K
    stability               adjusted Rand index of two clusterings         Hubert and Arabie 1985
    view agreement          share of views whose nearest other view is of the same image
    neighbour overlap       mean |kNN_x(i) and kNN_y(i)| / k               mutual k-NN, Huh 2024
    linear CKA              |Y'X|^2 / (|X'X| |Y'Y|), columns centred       Kornblith 2019, eq. 6

How well each tells whether an adapter helped is measured in bench/results/quality.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.methods.losses.clustering import kmeans_prototypes

NEIGHBOURS = 10  # of the overlaps
# the weight whose predictions rank the study's adapters best on both sets; one and a half times the lowest prediction,
# rounded away from 0, of an adapter that lost no accuracy (bench/results/quality.md)
DRIFT, CLEARLY_WORSE = 15.0, -15.0
CLUSTERS = 32  # of occupancy and stability; fewer where there are few images


def effective_rank(x: Tensor) -> float:
    """Between 1 and min(N, D): how many directions the features use. x: [N, D], of any length, not centred."""
    return _perplexity(torch.linalg.svdvals(x.double()))


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of two views of an image, 0 to 4; small is invariant."""
    return float((x.double() - y.double()).square().sum(-1).mean())


def uniformity(x: Tensor) -> float:
    """Log of the mean Gaussian potential over pairs of different images, -8 to 0; small is spread out."""
    squared = torch.pdist(x.double()).square()
    return float(torch.logsumexp(-2 * squared, 0)) - math.log(len(squared))


def occupancy(assigned: Tensor, num: int) -> float:
    """Perplexity of the cluster sizes over the number of clusters: 1 is equal use, 1 / num is one cluster.

    assigned: [N] int64 in 0 .. num - 1.
    """
    return _perplexity(torch.bincount(assigned, minlength=num).double()) / num


def stability(a: Tensor, b: Tensor) -> float:
    """Adjusted Rand index of two clusterings of the same images: 1 the same, 0 as chance would have it. a, b: [N]."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)

    def pairs(n: Tensor) -> float:
        return float((n * (n - 1) / 2).sum())

    both, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / pairs(table.sum()[None])
    most = (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def view_agreement(x: Tensor, y: Tensor) -> float:
    """Share of views whose most similar view of the other kind shows the same image, both ways; 1 / N by chance."""
    similarity, own = x.double() @ y.double().T, torch.arange(len(x), device=x.device)
    found = [(similarity.argmax(dim) == own).double().mean() for dim in (0, 1)]
    return float(sum(found) / 2)


def neighbor_overlap(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Mean share of an image's k nearest others that x and y have in common; k is at most N - 1."""
    k = min(k, len(x) - 1)
    near = torch.zeros(2, len(x), len(x), dtype=torch.bool, device=x.device)
    for mask, z in zip(near, (x.double(), y.double()), strict=True):
        similarity = z @ z.T
        similarity.fill_diagonal_(-torch.inf)
        mask.scatter_(1, similarity.topk(k).indices, True)
    return float((near[0] & near[1]).sum() / (k * len(x)))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """0 to 1: how far x and y agree up to rotation, scale and shift. Widths may differ; 0 where one is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    size = (x.T @ x).norm() * (y.T @ y).norm()
    return min(1.0, float((y.T @ x).square().sum() / size)) if size > 0 else 0.0


def clusters(x: Tensor, num: int, seed: int) -> Tensor:
    """[N] int64 in 0 .. num - 1: spherical k-means from a random start. num is at most N."""
    centres = kmeans_prototypes(x.float(), num, torch.Generator().manual_seed(seed))
    return (x.float() @ centres.T).argmax(1)


def scores(views: Tensor) -> dict[str, float]:
    """The scores of one model. views: [2, N, D], two random views of N images that it was not trained on, N >= 8."""
    x, y = (F.normalize(view.float(), dim=-1) for view in views)
    num = max(2, min(CLUSTERS, len(x) // 4))
    a, b = clusters(x, num, seed=0), clusters(y, num, seed=1)
    return {
        "effective_rank": effective_rank(x),
        "alignment": alignment(x, y),
        "uniformity": uniformity(x),
        "occupancy": occupancy(a, num),
        "stability": stability(a, b),
        "view_agreement": view_agreement(x, y),
        "view_overlap": neighbor_overlap(x, y),
    }


def judge(base: Tensor, adapted: Tensor) -> dict[str, float]:
    """An adapter's scores: the change of each against the base model, and how far the features went from it.

    base, adapted: [2, N, D], features of the same views of the same images, N >= 8. Returns the change of every score
    of `scores`, and base_overlap and base_cka in 0 .. 1.
    """
    before, after = scores(base), scores(adapted)
    x, y = (F.normalize(views[0].float(), dim=-1) for views in (base, adapted))
    return {
        **{name: after[name] - before[name] for name in before},
        "base_overlap": neighbor_overlap(x, y),
        "base_cka": linear_cka(x, y),
    }


def predicted_gain(judged: dict[str, float], drift: float = DRIFT) -> float:
    """One number of `judge`'s scores, to compare adapters by: the larger the better.

        100 (change of view agreement) - drift (1 - base_cka)

    Held-out images must be found again by their other view, and going far from the base model has its price. 0 is the
    base model itself; its size is not in points of accuracy. Below CLEARLY_WORSE nothing that was measured kept the
    base model's accuracy; below 0 many did. Where these constants come from, and how well it does:
    bench/results/quality.md.
    """
    return 100 * judged["view_agreement"] - drift * (1 - judged["base_cka"])


def _perplexity(weights: Tensor) -> float:
    """Exp of the entropy of non-negative weights, taken as shares; 1 if all are 0."""
    total = weights.sum()
    if total == 0:
        return 1.0
    return float(torch.special.entr(weights / total).sum().exp())
