"""Retrieval: every test image is a query, the training images are the gallery, ranked by cosine similarity.

Queries and gallery are apart as in landmark and in-shop retrieval (Philbin et al. 2007; Liu et al. 2016); metric
learning ranks the test images among themselves instead. Apart, queries are independent of each other given the gallery,
so the intervals of a mean over queries hold.

    rel(i)       1 if the gallery image at rank i is of the query's class, else 0;  R: number of relevant images
    precision(i) = 1/i sum_{j <= i} rel(j)
    recall@k     1 if rel(i) = 1 for an i <= k, else 0: at least one hit, as metric learning counts it
    AP           = 1/R sum_i rel(i) precision(i), over the whole ranking
    AP@R         = 1/R sum_{i <= R} rel(i) precision(i)           (Musgrave et al. 2020)

mAP, mAP@R: means over the queries. Images of equal similarity, to 1/STEPS, have no order: each number is its
expectation over all orders of them (McSherry and Najork 2008). In a group of t equal ones, r of them relevant, behind a
images of which q are relevant, rank i has

    E[rel(i) precision(i)] = r/t (q + 1 + (i - a - 1) (r - 1)/(t - 1)) / i
    P(no hit at ranks a + 1 .. k) = prod_{m < k - a} (t - r - m)/(t - m)

With harmonic numbers H the first sums to a closed form: no loop over ranks, and only the relevant images' ranks are
looked up in the sorted similarities.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upstep_fast.evaluation.features import Features
from upstep_fast.runtime import distributed
from upstep_fast.runtime.progress import track

RECALL_AT = (1, 5, 10)
BLOCK = 1 << 22  # similarities at once
STEPS = 2.0**20  # of a similarity within 0..1; products of equal images are rounded differently in their last bits


@dataclass(frozen=True)
class Retrieval:
    """Values per query, 0..1."""

    queries: Tensor  # [Q] int64, the test images whose class is in the gallery
    values: dict[str, Tensor]  # by measure, [Q] fp64


def retrieval(gallery: Features, test: Features) -> Retrieval:
    """Rank the gallery for each image of `test`: "recall_at_1", "recall_at_5", "recall_at_10", "map", "map_at_r".

    gallery, test: unit features with the classes in one order. Test images without a relevant image are left out. Each
    rank takes a part of the queries; all return the whole. Blocks of queries are the same for any number of ranks, as
    a product may round otherwise in another block.
    """
    names = [*(f"recall_at_{k}" for k in RECALL_AT), "map", "map_at_r"]
    by_class, sizes = gallery.x[gallery.y.argsort(stable=True)], torch.bincount(gallery.y, minlength=len(test.classes))
    queries = (sizes[test.y] > 0).nonzero()[:, 0]
    blocks = queries.split(max(1, BLOCK // max(1, len(by_class))))
    own = [block for block in blocks[distributed.rank() :: distributed.size()] if len(block)]
    parts = [torch.empty(0, len(names), dtype=torch.float64)]
    with track("eval: retrieval", sum(map(len, own)), "queries") as task:
        for block in own:
            similarity = (test.x[block] @ by_class.T).mul_(STEPS).round_()
            end = sizes.cumsum(0)[test.y[block], None]
            parts.append(_ranked(similarity, end - sizes[test.y[block], None], end))
            task.advance(len(block))
    distributed.wait_for_ranks()
    values = torch.empty(len(queries), len(names), dtype=torch.float64)
    order = torch.arange(len(queries)).split(max(1, len(blocks[0])))
    for rank, part in enumerate(distributed.gather_parts(torch.cat(parts))):
        if len(part):
            values[torch.cat(order[rank :: distributed.size()])] = part
    return Retrieval(queries, dict(zip(names, values.T.contiguous(), strict=True)))


def _ranked(similarity: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Return recall at RECALL_AT, AP and AP@R of each query, [B, 5] fp64.

    similarity: [B, G] fp32, overwritten; its columns begin to end, [B, 1] each, are the relevant images.
    """
    r_total = end - begin
    columns = begin + torch.arange(int(r_total.max()))
    of_relevant = columns < end
    best = similarity.gather(1, columns.clamp_max(similarity.shape[1] - 1)).masked_fill(~of_relevant, -torch.inf)
    best = best.sort(1, descending=True).values
    of_relevant = best > -torch.inf
    similarity.numpy().sort(axis=1)  # several times as fast as torch.sort, which finds the indices, too
    above, upto = _counts(similarity, best)  # similarity > v and >= v
    above_r, upto_r = _counts(best.flip(1).contiguous(), best)
    tied, tied_r = (upto - above).double(), (upto_r - above_r).double()

    def precision(limit: Tensor) -> Tensor:
        """Average the precisions at the relevant images up to a rank, [B]; those of a group have equal parts."""
        to = torch.minimum(upto, limit)
        slope = torch.where(tied > 1, (tied_r - 1) / (tied - 1).clamp_min(1), 0.0)
        harmonic = harmonics[to] - harmonics[above]
        each = ((above_r + 1 - slope * (above + 1)) * harmonic + slope * (to - above)) / tied
        return torch.where(of_relevant & (to > above), each, 0.0).sum(1) / r_total[:, 0]

    harmonics = torch.cat([torch.zeros(1), (1 / torch.arange(1, similarity.shape[1] + 1).double()).cumsum(0)])
    first, group, group_r = (x[:, 0].double() for x in (above, tied, tied_r))
    everything = torch.full_like(r_total, similarity.shape[1])
    hits = [_hit(first, group, group_r, k) for k in RECALL_AT]
    return torch.stack([*hits, precision(everything), precision(r_total)], 1)


def _counts(ascending: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of each row's sorted entries are above each value and at least it, [B, R] int64."""
    above, upto = (ascending.shape[1] - torch.searchsorted(ascending, values, right=right) for right in (True, False))
    return above, upto


def _hit(above: Tensor, tied: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Return P(a hit within k), [B], from the group of the most similar relevant image: none before it is relevant."""
    miss = torch.ones_like(above)
    for m in range(k):
        is_within = above + m < k
        miss = torch.where(is_within, miss * ((tied - relevant - m) / (tied - m).clamp_min(1)).clamp_min(0), miss)
    return 1 - miss
