"""Lists of copies, odd images and wrong classes, found by `curate`'s functions when they are first asked for."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from upstep_fast.config.curate import CurateConfig
from upstep_fast.data.sources.source import Source
from upstep_fast.data.sources.subset import subset
from upstep_fast.errors import first_line, printable
from upstep_fast.evaluation.curation.curate import find
from upstep_fast.evaluation.curation.findings import EXACT, MISLABELED, NEAR, OUTLIER, Finding
from upstep_fast.evaluation.curation.images import Images

log = logging.getLogger("upstep_fast")

MAX_IMAGES = 100_000  # all pairs are compared: minutes
MAX_ROWS = 1000  # of a list
COMPUTING = "computing"


@dataclass(eq=False)
class Lists:
    """Lists for the page. state: "" once they are there, COMPUTING, or why there are none."""

    source: Source
    names: tuple[str, ...]
    x: np.ndarray  # [N, D]
    rows: np.ndarray  # [N] number of each image in `source`, -1: not there
    channels: int
    state: str | None = None  # None: not asked for yet
    content: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def get(self) -> dict[str, Any]:
        """Return the state and, once they are there, hasLabels and the lists (content_of); the first call starts it."""
        with self._lock:
            if self.state is None:
                self.state = COMPUTING
                if len(self.names) > MAX_IMAGES:
                    self.state = (
                        f"these lists compare all pairs, of at most {MAX_IMAGES:,} images; use upstep-fast curate"
                    )
                else:
                    threading.Thread(target=self._compute, daemon=True, name="explore: lists").start()
        return {"state": self.state} | (self.content if self.state == "" else {})

    def _compute(self) -> None:
        try:
            present = np.flatnonzero(self.rows >= 0)
            if len(present) < 2:
                raise ValueError("fewer than 2 images are there")
            source = subset(self.source, self.rows[present].tolist())
            names = tuple(self.names[i] for i in present)
            labels = None if source.labels is None else tuple(source.labels)
            no_test = np.zeros(len(names), bool)
            missing = len(self.names) - len(names)
            images = Images(
                source, names, self.x[present], len(names), labels, no_test, self.channels, source.groups(), missing
            )
            content = content_of(find(images, CurateConfig("")).findings, {n: i for i, n in enumerate(self.names)})
            self.content = content | {"hasLabels": labels is not None}
            self.state = ""
        except Exception as error:  # the page is of use without them
            self.state = printable(f"these lists cannot be made: {first_line(error)}")
            log.warning("explore: %s", self.state)


def content_of(findings: tuple[Finding, ...], index: dict[str, int]) -> dict[str, Any]:
    """Return the findings as lists of indices: groups of copies, [index, z] and [index, reason]."""
    groups: dict[int, list[int]] = {}
    for f in findings:
        if f.finding in (EXACT, NEAR) and f.group is not None:
            groups.setdefault(f.group, []).append(index[f.path])
    outliers = [[index[f.path], round(f.score, 2)] for f in findings if f.finding == OUTLIER]
    classes = [[index[f.path], printable(f.why, 200)] for f in findings if f.finding == MISLABELED]
    copies = [group for group in groups.values() if len(group) > 1]
    full: dict[str, list[Any]] = {"copies": copies, "outliers": outliers, "classes": classes}
    return {name: rows[:MAX_ROWS] for name, rows in full.items()} | {"totals": {n: len(r) for n, r in full.items()}}
