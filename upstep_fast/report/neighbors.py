"""A few images with their nearest neighbors in feature space, before and after adaptation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from markupsafe import Markup
from torch import Tensor

from upstep_fast.report.rendering import render


def nearest(x: Tensor, queries: Sequence[int], k: int) -> list[list[int]]:
    """Return the k images nearest to each query by cosine similarity, nearest first, without the query.

    x: [N, D], unit length. At most N - 1 neighbors per query.
    """
    if not queries:
        return []
    rows = torch.tensor(list(queries))
    similarity = x[rows].double() @ x.double().T
    similarity[torch.arange(len(rows)), rows] = -torch.inf
    # ties go to the lower index, on any machine
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return order[:, : min(k, len(x) - 1)].tolist()


def neighbor_table(
    queries: Sequence[int], before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], names: Sequence[str]
) -> Markup:
    """Return an HTML table of each query with its neighbors before and after; new neighbors are framed."""
    return render("neighbors.html", rows=list(zip(queries, before, after, strict=True)), names=names)
