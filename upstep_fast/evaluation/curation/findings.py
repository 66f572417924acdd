"""Findings of curation, one row for each image and finding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upstep_fast.evaluation.curation import duplicates, mislabeled, outliers
from upstep_fast.evaluation.curation.leaks import leaks
from upstep_fast.evaluation.curation.neighbors import Neighbors

EXACT, NEAR, LEAK, OUTLIER, MISLABELED, CONFLICT = "exact", "near", "leak", "outlier", "mislabeled", "conflict"
KINDS = (EXACT, NEAR, LEAK, OUTLIER, MISLABELED, CONFLICT)
KEEP, DROP, LOOK = "keep", "drop", "look"


@dataclass(frozen=True)
class Finding:
    """One finding on one image; the fields are the columns of curation.csv."""

    path: str
    finding: str  # one of KINDS
    score: float  # similarity to `other`; for an outlier z; for a class the share of votes against it
    group: int | None  # number of the group of copies, from 1
    other: str  # the image that is kept, the copy for testing, or the nearest of the proposed class
    suggested: str  # keep, drop, look, or a class
    why: str


@dataclass(frozen=True, eq=False)
class Copies:
    """Groups of copies: the number of each image's group is the least index in it, [N] int64."""

    exact: np.ndarray
    group: np.ndarray  # exact and near copies together


def copies_found(
    copies: Copies, names: Sequence[str], unit: np.ndarray, is_test: np.ndarray, num: int, pixels: dict[int, int]
) -> list[Finding]:
    """Return copies and leaks among the first `num` images, group by group; unit: [N, D] unit features."""
    found: list[Finding] = []
    leaked = dict(leaks(copies.group, is_test))
    for number, images in enumerate(duplicates.members(copies.group), 1):
        rest = [i for i in images if i not in leaked and i < num]
        if len(rest) > 1:
            keep = duplicates.kept(rest, lambda i: pixels.get(i, 0))
            is_exact = {i: copies.exact[i] == copies.exact[keep] for i in rest}
            for i in sorted(rest, key=lambda i: (i != keep, i)):
                exact = all(is_exact.values()) if i == keep else is_exact[i]
                why = f"largest, or first, of {len(rest)}" if i == keep else _copy_of(exact, names[keep])
                score, what = _cosine(unit, i, keep), KEEP if i == keep else DROP
                kind = EXACT if exact else NEAR
                found.append(Finding(names[i], kind, score, number, names[keep] if i != keep else "", what, why))
        for i in images:
            if i in leaked and i < num:
                test = leaked[i]
                why = _copy_of(copies.exact[i] == copies.exact[test], f"the test image {names[test]}")
                found.append(Finding(names[i], LEAK, _cosine(unit, i, test), number, names[test], DROP, why))
    return found


def outliers_found(neighbors: Neighbors, names: Sequence[str], num: int) -> list[Finding]:
    """Return the images of the first `num` that are unlike the others, the least alike first."""
    z = outliers.outlier_scores(neighbors)[:num]
    order = [i for i in np.argsort(-z, kind="stable").tolist() if z[i] >= outliers.LISTED]
    near = [_first(neighbors, i) for i in order]
    why = "far from its neighbors, by robust standard deviations"
    return [
        Finding(names[i], OUTLIER, float(z[i]), None, names[j] if j >= 0 else "", LOOK, why)
        for i, j in zip(order, near, strict=True)
    ]


def classes_found(neighbors: Neighbors, copies: Copies, names: Sequence[str], labels: Sequence[str]) -> list[Finding]:
    """Return the images whose neighbors, or copies, have another class; labels: of the first images, [num].

    neighbors: without those that have no class.
    """
    classes, of = np.unique(np.array(labels, dtype=object), return_inverse=True)
    y = np.concatenate([of, np.zeros(len(names) - len(of), np.int64)]).astype(np.int64)
    p = mislabeled.shares(neighbors, y, len(classes))[: len(labels)]
    found = mislabeled.votes(p, of)
    result = []
    for i in found.ranked().tolist():
        own, best, proposed = float(found.own[i]), float(found.best[i]), int(found.proposed[i])
        of_class = neighbors.counts[i] & (y[neighbors.index[i]] == proposed)
        other = names[int(neighbors.index[i][of_class.argmax()])]
        why = f"{best:.0%} of the neighbors' votes are for {classes[proposed]}, {own:.0%} for {labels[i]}"
        result.append(Finding(names[i], MISLABELED, 1 - own, None, other, str(classes[proposed]), why))
    for number, images in enumerate(duplicates.members(copies.group), 1):
        own_classes = sorted({labels[i] for i in images if i < len(labels)})
        if len(own_classes) > 1:
            why = f"copies of one image are in {', '.join(own_classes)}"
            for i in (i for i in images if i < len(labels)):
                vote = max(own_classes, key=lambda name: p[i][np.searchsorted(classes, name)])
                result.append(Finding(names[i], CONFLICT, float(len(own_classes)), number, "", vote, why))
    return result


def _copy_of(exact: bool, name: str) -> str:
    return f"the same bytes as {name}" if exact else f"nearly the picture {name}"


def _cosine(unit: np.ndarray, i: int, j: int) -> float:
    return float(unit[i] @ unit[j])


def _first(neighbors: Neighbors, i: int) -> int:
    return next(iter(neighbors.index[i][neighbors.counts[i]].tolist()), -1)
