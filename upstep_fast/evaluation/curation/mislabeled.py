"""Images whose neighbors have another class.

    p_ic = sum over the k nearest j of class c of w_ij / sum over all of them,   w_ij = exp((cosine_ij - 1) / 0.07)
    t_c  = mean of p_ic over the images i of class c
    listed: the class c of largest p_ic among those with p_ic >= t_c is not the image's own, and p_ic > 1/2
    order:  by the share of the own class, the smallest first (self-confidence)

The vote leaves out the image itself and its copies. t_c keeps a class that is often voted for from drawing images out
of others. Source: Northcutt, Jiang, Chuang, JAIR 2021, "Confident learning: estimating uncertainty in dataset labels",
section 3.1 (the confident joint), with the votes of k-NN as probabilities. More than half of them is asked for here:
without it every other image is listed where k-NN is right for half of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upstep_fast.evaluation.curation.neighbors import Neighbors

K = 20
MAJORITY = 0.5
TEMPERATURE = 0.07  # of the votes, as in eval


@dataclass(frozen=True, eq=False)
class Votes:
    """The neighbors' vote for each image."""

    own: np.ndarray  # [N] share of the own class
    best: np.ndarray  # [N] share of the proposed class
    proposed: np.ndarray  # [N] int64, the class of most votes among those above their mean
    listed: np.ndarray  # [N] bool: the proposed class is another

    def ranked(self) -> np.ndarray:
        """Return the listed images of which more than half of the votes are for another class, the clearest first."""
        found = np.flatnonzero(self.listed & (self.best > MAJORITY))
        return found[np.lexsort((-self.best[found], self.own[found]))]


def shares(neighbors: Neighbors, y: np.ndarray, num_classes: int, k: int = K) -> np.ndarray:
    """Return p [N, C], fp32; a row is 0 where no neighbor counts. y: [N] int64."""
    weights = np.exp((neighbors.similarity - 1) / TEMPERATURE) * neighbors.first(k)
    p = np.zeros((len(y), num_classes), np.float32)
    rows = np.repeat(np.arange(len(y)), weights.shape[1])
    np.add.at(p, (rows, y[neighbors.index].ravel()), weights.ravel())
    total = p.sum(1, keepdims=True)
    return np.divide(p, total, out=p, where=total > 0)


def votes(p: np.ndarray, y: np.ndarray) -> Votes:
    """Return what the shares p [N, C] say of the classes y [N]."""
    rows = np.arange(len(y))
    own = p[rows, y]
    count = np.bincount(y, minlength=p.shape[1])
    mean = np.bincount(y, own, minlength=p.shape[1]) / np.maximum(count, 1)
    confident = np.where((p >= mean) & (p > 0) & (count > 0), p, -1.0)
    best = confident.argmax(1)
    proposed = np.where(confident[rows, best] >= 0, best, y)
    return Votes(own, p[rows, proposed], proposed, proposed != y)
