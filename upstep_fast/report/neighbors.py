"""Which images the features hold to be alike, before and after: a few images with their nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def nearest(x: Tensor, queries: Sequence[int], k: int) -> list[list[int]]:
    """The k images nearest to each query by cosine, nearest first, without itself. x: [N, D], unit length."""
    if not queries:
        return []
    chosen = torch.tensor(list(queries))
    similarity = x[chosen].double() @ x.double().T
    similarity[torch.arange(len(chosen)), chosen] = -torch.inf
    # ties go to the lower number, on any machine
    order = similarity.argsort(dim=1, descending=True, stable=True)
    return order[:, : min(k, len(x) - 1)].tolist()


def sheet(
    queries: Sequence[int],
    before: Sequence[Sequence[int]],
    after: Sequence[Sequence[int]],
    names: Sequence[str],
    text: Callable[[str], str],
) -> str:
    """A table: the image, its neighbours before, its neighbours after; those that are new are marked."""

    def cell(i: int, kind: str = "") -> str:
        return (
            f'<svg class="thumb {kind}" viewBox="0 0 96 96" role="img"><title>{text(names[i])}</title>'
            f'<use href="#t{i}"/></svg>'
        )

    rows = []
    for query, old, new in zip(queries, before, after, strict=True):
        cells = [cell(query), "".join(cell(i) for i in old), "".join(cell(i, "new" * (i not in old)) for i in new)]
        rows.append(f"<tr>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("image", "nearest before", "nearest after"))
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="sheet">{table}</table></div>'
