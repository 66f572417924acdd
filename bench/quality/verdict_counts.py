"""How often the label-free verdict of `adapt` was right, counted over the stored runs of the study.

    cd bench/results && python ../quality/verdict_counts.py study_cpu2.jsonl study_cpu3.jsonl --out verdict.json

A run as trained is one row of split "select" at strength 1; the other strengths of an adapter are no independent runs
and are counted apart. gained: k-NN accuracy of the adapted features above the base model's; lost: by more than WORSE
points. The stored scores are of 256 images of the test part and have no interval, so the groups are by the score alone.
The score's constants were chosen on some of these runs; "left_out" counts predictions with constants fitted on the
other data sets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from study_predictor import TRAINED, WORSE, Point, leave_one_out, points

from upstep_fast.evaluation.intervals import accuracy_interval
from upstep_fast.evaluation.label_free import CLEARLY_WORSE


def counts(files: Sequence[Path]) -> dict[str, Any]:
    """Return {"runs": ..., "adapters": ..., "left_out": ...} by group of scores, each as of `group_counts`."""
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    every = points(row for row in rows if row.get("split") == "select" and row.get("at"))
    trained = [point for point in every if point.strength == TRAINED]
    left_out = {id(p): value for p, (value, _) in zip(every, leave_one_out(every), strict=True)}
    return {
        "sources": [path.name for path in files],
        "data_sets": sorted({point.data for point in every}),
        "lost_means_points_below": -WORSE,
        "runs": group_counts((p.scores["predicted_gain"], p) for p in trained),
        "adapters": group_counts((p.scores["predicted_gain"], p) for p in every),
        "left_out": group_counts((left_out[id(p)], p) for p in trained),
    }


def group_counts(scored: Iterable[tuple[float, Point]]) -> dict[str, dict[str, Any]]:
    """Return by group of scores: n, gained, lost, and the 95 % interval of the share of gained in percent."""
    groups: dict[str, list[float]] = {"above_0": [], "between": [], "clearly_worse": []}
    for score, point in scored:
        groups["above_0" if score > 0 else "between" if score >= CLEARLY_WORSE else "clearly_worse"].append(point.gain)
    return {name: _counts(gains) for name, gains in groups.items()}


def _counts(gains: Sequence[float]) -> dict[str, Any]:
    gained = torch.tensor([gain > 0 for gain in gains], dtype=torch.bool)
    share = [round(v, 1) for v in accuracy_interval(gained)] if gains else None
    return {
        "n": len(gains),
        "gained": int(gained.sum()),
        "lost": sum(gain < -WORSE for gain in gains),
        "share_gained_95": share,
    }


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(counts(args.files), indent=2) + "\n")


if __name__ == "__main__":
    main()
