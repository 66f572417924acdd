"""Few-shot accuracy: the class whose mean of n labeled images is nearest (Snell et al. 2017).

    m_c = 1/n sum of n unit features of class c;   class of x = argmin_c |x - m_c|^2 = argmax_c x . m_c - |m_c|^2 / 2

The n images are drawn from the training part, once for each of SEEDS seeds and the same for every kind of features. A
class with fewer images gives all that it has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upstep_fast.evaluation.features import Features
from upstep_fast.evaluation.intervals import SEEDS

SHOTS = (1, 5, 10)


def few_shot_right(train: Features, test: Features, shots: int) -> Tensor:
    """Return which images of `test` the nearest class mean of `shots` images gets right, [SEEDS, N] bool.

    train, test: unit features with the classes in one order. Classes without a training image are never chosen.
    """
    return torch.stack([_right(train, test, draw(train.y, shots, seed)) for seed in range(SEEDS)])


def draw(y: Tensor, shots: int, seed: int) -> Tensor:
    """Return the indices of `shots` images of each class, or all of a smaller class. y: [N] int64."""
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    order = shuffled[y[shuffled].argsort(stable=True)]
    counts = torch.bincount(y)
    place = torch.arange(len(y)) - (counts.cumsum(0) - counts)[y[order]]  # within the class
    return order[place < shots]


def _right(train: Features, test: Features, chosen: Tensor) -> Tensor:
    y = train.y[chosen]
    counts = torch.bincount(y, minlength=len(train.classes))
    sums = torch.zeros(len(counts), train.x.shape[1]).index_add_(0, y, train.x[chosen])
    means = sums / counts.clamp_min(1)[:, None]
    offset = (means.square().sum(1) / 2).masked_fill(counts == 0, torch.inf)
    nearest = [(x @ means.T - offset).argmax(1) for x in test.x.split(4096)]
    return torch.cat(nearest) == test.y
