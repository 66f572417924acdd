"""Accuracies of a run (eval.json) as text, table and bar chart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from upstep_fast.errors import printable
from upstep_fast.report.charts import Bar
from upstep_fast.report.run_record import number

KINDS = ("base", "adapted", "ensemble")
MEASURES = {
    "knn": "k-NN",
    "knn_whitened": "k-NN, whitened",
    "linear": "linear probe",
    "linear_whitened": "linear probe, whitened",
}
HEADER = ["features", *MEASURES.values(), "k-NN on the source domain", "k-NN on the source domain, whitened"]


def standard_error(percent: float, count: float) -> float:
    """Return the binomial standard error of an accuracy over n = `count` images, sqrt(p (1 - p) / n), in percent."""
    p = percent / 100
    return 100 * math.sqrt(max(0.0, p * (1 - p)) / count)


def accuracy_rows(scores: dict[str, Any]) -> list[list[str]]:
    """Return the table under HEADER: one row per kind of features that has an accuracy."""
    rows = []
    for kind in KINDS:
        cells = [accuracy_text(scores, kind, measure) for measure in MEASURES]
        rows.append([kind, *cells, *(_source_text(scores.get(key), kind) for key in ("source", "source_whitened"))])
    return [row for row in rows if any(row[1:])]


def accuracy_text(scores: dict[str, Any], kind: str, measure: str) -> str:
    """Return "61.0 ± 2.4", in percent; "61.0" where the number of images is unknown, "" without an accuracy."""
    part = scores.get(kind)
    percent, count = number(part.get(measure)) if isinstance(part, dict) else None, number(scores.get("n_test"))
    if percent is None:
        return ""
    return f"{percent:.1f} ± {standard_error(percent, count):.1f}" if count and count > 0 else f"{percent:.1f}"


def accuracy_bars(scores: dict[str, Any]) -> Iterator[Bar]:
    """Yield a bar for each accuracy, grouped by measure."""
    count = number(scores.get("n_test"))
    for measure, group in MEASURES.items():
        for kind in KINDS:
            part = scores.get(kind)
            percent = number(part.get(measure)) if isinstance(part, dict) else None
            if percent is not None and 0 <= percent <= 100:
                error = standard_error(percent, count) if count and count > 0 else None
                yield Bar(group, kind, percent, error)


def accuracy_notes(scores: dict[str, Any]) -> list[str]:
    """Return sentences on what limits the figures: changes within their error, and the notes of `eval`."""
    named = [f"{kind} {MEASURES[key]}" for kind in KINDS for key in MEASURES if within_error(scores, kind, key)]
    notes = scores.get("notes")
    found = [printable(note) for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    if named:
        found.insert(0, "Changes from the base model within the error (95 % interval holds 0): " + ", ".join(named))
    return found


def within_error(scores: dict[str, Any], kind: str, measure: str) -> bool:
    """Return True if `eval` said that the change from the base model is within its error."""
    part: Any = scores
    for key in ("gains", kind, measure, "within_error"):
        part = part.get(key) if isinstance(part, dict) else None
    return part is True


def _source_text(source: Any, kind: str) -> str:
    percent = number(source.get(kind)) if isinstance(source, dict) else None
    return "" if percent is None else f"{percent:.1f}"
