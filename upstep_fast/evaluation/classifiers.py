"""k-NN and linear-probe accuracy of features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from upstep_fast.data.labeled.splits import held_out as held_out_of
from upstep_fast.evaluation.features import Features
from upstep_fast.evaluation.logistic import Logistic, fit_logistic
from upstep_fast.runtime import distributed

KNN_TEMPERATURE = 0.07  # of the votes, as in DINO's k-NN
PROBE_WEIGHTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2 weights, chosen on a held-out part of train
PROBE_HELD_OUT = 0.2


def knn(train: Features, test: Features, k: int = 20) -> float:
    """Return the top-1 accuracy in percent of `knn_right`."""
    return 100.0 * knn_right(train, test, k).float().mean().item()


def knn_right(train: Features, test: Features, k: int = 20) -> Tensor:
    """Return which images of `test` a k-NN classifier gets right, [N] bool; votes weigh exp(similarity / 0.07).

    train, test: unit features with the classes in one order. k is limited to the size of `train`. Each rank classifies
    a part of `test`; all return the whole.
    """
    local = slice(distributed.rank(), None, distributed.size())
    own = knn_correct(train, Features(test.x[local], test.y[local], test.classes), k)
    distributed.wait_for_ranks()
    right = torch.empty(len(test.y), dtype=torch.bool)
    for rank, part in enumerate(distributed.gather_parts(own.to(torch.uint8))):
        right[rank :: distributed.size()] = part.bool()
    return right


def knn_correct(train: Features, test: Features, k: int = 20) -> Tensor:
    """Return `knn_right` without communication; all images of `test` are classified here."""
    one_hot = F.one_hot(train.y, len(train.classes)).float()
    correct = [torch.empty(0, dtype=torch.bool)]
    for x, y in zip(test.x.split(1024), test.y.split(1024), strict=True):
        correct.append(_voted(x @ train.x.T, one_hot, min(k, len(train.x))) == y)
    return torch.cat(correct)


def knn_right_among(x: Tensor, y: Tensor, k: int, files: Tensor | None = None) -> Tensor:
    """Return which images k-NN gets right by the images of other files, [N] bool. x: [N, D] unit; y: [N] int64 from 0.

    files: number of each image's file, [N] int64; None: each image is one.
    """
    files = torch.arange(len(x)) if files is None else files
    similarity = (x @ x.T).masked_fill_(files[:, None] == files, -torch.inf)
    return _voted(similarity, F.one_hot(y).float(), min(k, len(x) - 1)) == y


def _voted(similarity: Tensor, one_hot: Tensor, k: int) -> Tensor:
    nearest = similarity.topk(k, dim=1)
    weights = ((nearest.values - 1) / KNN_TEMPERATURE).exp()
    return (one_hot[nearest.indices] * weights[..., None]).sum(1).argmax(1)


@dataclass(frozen=True)
class Probe:
    """A linear probe of one kind of features."""

    right: Tensor  # [N] bool, per test image
    l2: float  # weight chosen
    at_edge: bool  # the smallest or largest weight tried was better than the next: one beyond may be better still
    converged: bool  # all fits reached their optimum


def linear_probe(train: Features, test: Features, *, seed: int = 0) -> float:
    """Return the top-1 accuracy in percent of `probe`."""
    return 100.0 * probe(train, test, seed=seed).right.float().mean().item()


def probe(train: Features, test: Features, *, seed: int = 0, groups: np.ndarray | None = None) -> Probe:
    """Fit logistic regression; its L2 weight is chosen on a part of `train`, the smallest of equally good ones.

    groups: number of the file of each image of `train`, [N]: no file is on both sides of that choice; None: each image
    is one. With one file per class nothing can be held out, and the middle weight is taken.
    """
    mean, std = train.x.mean(0), train.x.std(0, correction=0).clamp_min(1e-6)
    x, x_test = (train.x - mean) / std, (test.x - mean) / std
    if len(x) < x.shape[1]:  # the weights lie in the span of the training images: the same fit in N dimensions
        basis = torch.linalg.qr(x.T)[0]
        x, x_test = x @ basis, x_test @ basis
    held_out = held_out_of(train.y, PROBE_HELD_OUT, seed, groups)
    classes = len(train.classes)
    best, at_edge, converged, start = PROBE_WEIGHTS[len(PROBE_WEIGHTS) // 2], False, True, None
    if held_out.any():
        fits: dict[float, Logistic] = {}
        counts = {}
        for l2 in PROBE_WEIGHTS:  # from the largest: each fit starts at the one before
            start = fits[l2] = fit_logistic(x[~held_out], train.y[~held_out], classes, l2, start)
            counts[l2] = int(_right(start, x[held_out], train.y[held_out]).sum())
        best = max(reversed(PROBE_WEIGHTS), key=counts.__getitem__)
        start, converged = fits[best], all(fit.converged for fit in fits.values())
        next_to = {PROBE_WEIGHTS[0]: PROBE_WEIGHTS[1], PROBE_WEIGHTS[-1]: PROBE_WEIGHTS[-2]}
        at_edge = best in next_to and counts[best] > counts[next_to[best]]
    model = fit_logistic(x, train.y, classes, best, start)
    return Probe(_right(model, x_test, test.y), best, at_edge, converged and model.converged)


def _right(model: Logistic, x: Tensor, y: Tensor) -> Tensor:
    return model.scores(x).argmax(1) == y
