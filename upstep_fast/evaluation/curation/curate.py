"""Curation of a set of images: features, copies, odd ones and classes, as one result."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from upstep_fast.config.curate import CurateConfig
from upstep_fast.config.reading import Reading
from upstep_fast.data.curation.copy_hashes import are_copies
from upstep_fast.evaluation.curation import duplicates, findings
from upstep_fast.evaluation.curation.findings import DROP, KINDS, Copies, Finding
from upstep_fast.evaluation.curation.images import Images
from upstep_fast.evaluation.curation.neighbors import Neighbors, nearest
from upstep_fast.evaluation.search.exact import unit_rows
from upstep_fast.runtime.progress import track


@dataclass(frozen=True, eq=False)
class Curation:
    """Result of `find`: the findings, and the images that are kept."""

    names: tuple[str, ...]  # of the images of --data, in their order
    findings: tuple[Finding, ...]  # copies by group, leaks, outliers from the oddest on, classes from the clearest on
    kept: tuple[str, ...]  # without the images that --drop names
    threshold: float  # least similarity of near copies
    notes: tuple[str, ...]  # what could not be looked for, and how
    out: Path  # folder of curation.html and curation.csv
    reading: Reading  # how the images were read

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by finding; of copies without those that are kept."""
        counts = Counter(f.finding for f in self.findings if f.suggested != findings.KEEP)
        return {kind: counts[kind] for kind in KINDS}


def find(images: Images, config: CurateConfig) -> Curation:
    """Return what there is to find among the images."""
    exact = duplicates.exact_groups(images.digests())
    unit = unit_rows(images.x)
    neighbors = _neighbors(unit, exact, images.files)
    least = duplicates.threshold(neighbors)
    group = _near(unit, exact, neighbors, least, images)
    copies = Copies(exact, group)
    images.read_hashes([i for m in duplicates.members(group) for i in m])  # for the sizes of exact copies
    found = findings.copies_found(copies, images.names, unit, images.is_test, images.num, images.pixels)
    others = neighbors.without(group)
    of_data = Neighbors(others.index, others.similarity, others.counts & (others.index < images.num))
    found += findings.outliers_found(of_data, images.names, images.num)
    if images.labels is not None and len(set(images.labels)) > 1:
        found += findings.classes_found(of_data, copies, images.names, images.labels)
    out = {f.path for f in found if _is_dropped(f, config.drop)}
    names = images.names[: images.num]
    kept = tuple(name for name in names if name not in out)
    return Curation(
        names, tuple(found), kept, least, tuple(_notes(images, least)), Path(config.out), images.source.reading
    )


def _is_dropped(finding: Finding, kinds: tuple[str, ...]) -> bool:
    return finding.finding in kinds and (finding.suggested == DROP or finding.finding in ("outlier", "mislabeled"))


def _neighbors(unit: np.ndarray, exact: np.ndarray, files: np.ndarray | None) -> Neighbors:
    """Return the neighbors among the first of equal images; a copy has those of its first."""
    firsts, at = np.unique(exact, return_inverse=True)
    with track("curate: neighbors", len(firsts)) as task:
        found = nearest(unit[firsts], task=task)
    neighbors = Neighbors(firsts[found.index][at], found.similarity[at], found.counts[at])
    return neighbors if files is None else neighbors.without(files)


def _near(unit: np.ndarray, exact: np.ndarray, neighbors: Neighbors, least: float, images: Images) -> np.ndarray:
    """Return the groups of exact and near copies, [N] int64.

    Of a group of more copies than an image has candidates the neighbors may form several; these are joined where the
    first images of two groups are copies.
    """

    def confirmed(pairs: np.ndarray) -> np.ndarray:
        pairs = np.unique(np.sort(exact[pairs], axis=1), axis=0) if len(pairs) else pairs.reshape(0, 2)
        images.read_hashes(sorted(set(pairs.ravel().tolist())))
        known = np.array([a in images.hashes and b in images.hashes for a, b in pairs.tolist()], bool)
        pairs = pairs[known & (pairs[:, 0] != pairs[:, 1])]
        if not len(pairs):
            return pairs
        first, second = (np.stack([images.hashes[i] for i in column]) for column in pairs.T.tolist())
        return pairs[are_copies(first, second)]

    all_pairs = np.stack([exact, np.arange(len(exact))], 1)
    pairs = confirmed(duplicates.candidates(neighbors, least))
    while True:
        all_pairs = np.concatenate([all_pairs, pairs])
        group = duplicates.components(len(exact), all_pairs)
        leaders = np.unique(group[pairs[:, 0]]) if len(pairs) else pairs[:, 0]
        if len(leaders) < 2:
            return group
        found = nearest(unit[leaders], duplicates.CANDIDATES)
        among = Neighbors(leaders[found.index], found.similarity, found.counts)
        if images.files is not None:
            among = Neighbors(
                among.index, among.similarity, images.files[among.index] != images.files[leaders][:, None]
            )
        a, column = np.nonzero(among.counts & (among.similarity >= least))
        more = confirmed(np.stack([leaders[a], among.index[a, column]], 1))
        if not len(more):
            return group
        pairs = more


def _notes(images: Images, least: float) -> list[str]:
    notes = [
        f"near copies: similarity of at least {least:.3f} (nine of ten images have a neighbor as near), and the "
        "perceptual hash agrees"
    ]
    if images.labels is None:
        notes.append("classes: not looked at, as not all images have one")
    elif len(set(images.labels)) < 2:
        notes.append("classes: not looked at, as there is only one")
    if not images.is_test.any():
        notes.append("leaks: not looked for, as there is no test part; --against names one")
    if images.files is not None:
        notes.append("pictures of one file are not compared with each other")
    if images.num_missing:
        notes.append(f"{images.num_missing:,} images without features are left out")
    return notes
