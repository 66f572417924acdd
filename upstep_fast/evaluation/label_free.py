"""Label-free scores of features: pure functions, one set of scores per model, and a predicted gain of an adapter.

    x, y      [N, D]  features of the same N images by two models, or of two views by one model; unit length unless
                      a function says otherwise. Scores are Python floats, computed in float64.

    effective rank          exp H(p), p = singular values / their sum      Roy and Vetterli 2007; RankMe, Garrido 2023
    alignment, uniformity   E |x - y|^2;  log E exp(-2 |x_i - x_j|^2)      Wang and Isola 2020
    occupancy               exp H(share of each cluster) / K
    stability               adjusted Rand index of two clusterings         Hubert and Arabie 1985
    view agreement          share of views whose nearest other view is of the same image
    neighbor overlap        mean |kNN_x(i) and kNN_y(i)| / k               mutual k-NN, Huh 2024
    linear CKA              |Y'X|^2 / (|X'X| |Y'Y|), columns centered      Kornblith 2019, eq. 6

bench/results/quality.md measures how well each score predicts whether an adapter improves accuracy.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.methods.losses.clustering import spherical_kmeans

NEIGHBORS = 10  # of the overlaps
# DRIFT: the weight whose predictions rank the study's adapters best on both sets. CLEARLY_WORSE: 1.5 times the lowest
# prediction, rounded away from 0, of an adapter that lost no accuracy (bench/results/quality.md)
DRIFT, CLEARLY_WORSE = 15.0, -15.0
CLUSTERS = 32  # of occupancy and stability; at most a quarter of the images


def effective_rank(x: Tensor) -> float:
    """Return the number of directions that the features use, 1 to min(N, D). x: [N, D], any length, not centered."""
    return _perplexity(torch.linalg.svdvals(x.double()))


def alignment(x: Tensor, y: Tensor) -> float:
    """Return the mean squared distance of two views of an image, 0 to 4; small means invariant."""
    return float((x.double() - y.double()).square().sum(-1).mean())


def uniformity(x: Tensor) -> float:
    """Return the log of the mean Gaussian potential over pairs of images, -8 to 0; small means spread out."""
    squared = torch.pdist(x.double()).square()
    return float(torch.logsumexp(-2 * squared, 0)) - math.log(len(squared))


def occupancy(assigned: Tensor, num: int) -> float:
    """Return the perplexity of the cluster sizes over the number of clusters: 1 is equal use, 1 / num is one cluster.

    assigned: [N] int64 in 0 .. num - 1.
    """
    return _perplexity(torch.bincount(assigned, minlength=num).double()) / num


def stability(a: Tensor, b: Tensor) -> float:
    """Return the adjusted Rand index of two clusterings: 1 for equal ones, 0 at chance. a, b: [N] int64 labels."""
    table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.float64)
    table.index_put_((a, b), torch.ones(len(a), dtype=torch.float64), accumulate=True)

    def pairs(n: Tensor) -> float:
        return float((n * (n - 1) / 2).sum())

    both, in_a, in_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = in_a * in_b / pairs(table.sum()[None])
    maximum = (in_a + in_b) / 2
    return 1.0 if maximum == expected else (both - expected) / (maximum - expected)


def views_found(x: Tensor, y: Tensor) -> Tensor:
    """Return whether the nearest view in the other set is of the same image, [2, N] bool: of each y, of each x."""
    similarity, expected = x.double() @ y.double().T, torch.arange(len(x), device=x.device)
    return torch.stack([similarity.argmax(dim) == expected for dim in (0, 1)])


def view_agreement(x: Tensor, y: Tensor) -> float:
    """Return the share of views whose nearest view in the other set is of their image, both ways; chance: 1 / N."""
    return float(views_found(x, y).double().mean())


def neighbor_overlap(x: Tensor, y: Tensor, k: int = NEIGHBORS) -> float:
    """Return the mean share of an image's k nearest neighbors that x and y have in common. k: limited to N - 1."""
    k = min(k, len(x) - 1)
    near = torch.zeros(2, len(x), len(x), dtype=torch.bool, device=x.device)
    for mask, z in zip(near, (x.double(), y.double()), strict=True):
        similarity = z @ z.T
        similarity.fill_diagonal_(-torch.inf)
        mask.scatter_(1, similarity.topk(k).indices, True)
    return float((near[0] & near[1]).sum() / (k * len(x)))


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA, 0 to 1: agreement up to rotation, scale and shift; 0 if x or y is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    size = (x.T @ x).norm() * (y.T @ y).norm()
    return min(1.0, float((y.T @ x).square().sum() / size)) if size > 0 else 0.0


def clusters(x: Tensor, num: int, seed: int) -> Tensor:
    """Return clusters by spherical k-means from a random start, [N] int64 in 0 .. num - 1. num: at most N."""
    centers = spherical_kmeans(x.float(), num, torch.Generator().manual_seed(seed))
    return (x.float() @ centers.T).argmax(1)


def scores(views: Tensor) -> dict[str, float]:
    """Return the scores of one model. views: [2, N, D], two random views of N >= 8 images that were not trained on."""
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
    """Return the change of every score against the base model, and the similarity of the features to the base model's.

    base, adapted: [2, N, D], features of two views of N >= 8 images; both models see equal views. The similarities are
    base_overlap and base_cka, 0 to 1.
    """
    before, after = scores(base), scores(adapted)
    x, y = (F.normalize(views[0].float(), dim=-1) for views in (base, adapted))
    return {
        **{name: after[name] - before[name] for name in before},
        "base_overlap": neighbor_overlap(x, y),
        "base_cka": linear_cka(x, y),
    }


def predicted_gain(judged: dict[str, float], drift: float = DRIFT) -> float:
    """Return one number to rank adapters by, larger is better, from the scores of `judge`.

        100 (change of view agreement) - drift (1 - base_cka)

    It rewards images that are found by their other view and penalizes distance from the base model, whose value is 0.
    It is not in points of accuracy. Below CLEARLY_WORSE no measured adapter kept the base model's accuracy, below 0
    many did. Source of the constants, and accuracy of the prediction: bench/results/quality.md.
    """
    return 100 * judged["view_agreement"] - drift * (1 - judged["base_cka"])


def _perplexity(weights: Tensor) -> float:
    """Return the exp of the entropy of non-negative weights, normalized to sum 1; 1 if all are 0."""
    total = weights.sum()
    if total == 0:
        return 1.0
    return float(torch.special.entr(weights / total).sum().exp())
