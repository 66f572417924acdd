"""Names and tables of the measures of `eval --measures` beside k-NN and the linear probe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from upstep_fast.errors import printable
from upstep_fast.report.run_record import number
from upstep_fast.runtime import terminal

KINDS = ("base", "adapted", "ensemble")
# {measure: {key in the JSON of eval: heading}}
TITLES = {
    "retrieval": "retrieval of training images by test images",
    "few-shot": "nearest class mean of a few training images, 10 draws",
    "clusters": "k-means clusters of the test images against their classes, 10 starts",
}
NAMES = {
    "retrieval": {
        "recall_at_1": "recall@1",
        "recall_at_5": "recall@5",
        "recall_at_10": "recall@10",
        "map": "mAP",
        "map_at_r": "mAP@R",
    },
    "few-shot": {"few_shot_1": "1 a class", "few_shot_5": "5 a class", "few_shot_10": "10 a class"},
    "clusters": {"purity": "purity", "nmi": "NMI", "ari": "ARI"},
}
WORST = 10  # classes shown


def rows_of(result: dict[str, Any], measure: str) -> Iterator[list[str]]:
    """Yield the rows of a measure's table, one per kind and form of features: its name and one cell a column."""
    for kind in KINDS:
        for form, suffix in (("", ""), (", whitened", "_whitened")):
            cells = [cell(result, kind, f"{key}{suffix}") for key in NAMES[measure]]
            if any(cells):
                yield [f"{kind}{form}", *cells]


def class_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table per class under `class_header`, the worst class first."""
    rows = result.get("per_class")
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict):
            counts = [f"{count:.0f}" if (count := number(row.get(key))) is not None else "" for key in _COUNTS]
            keys = _class_columns(result)
            yield [printable(str(row.get("class"))), *counts, *(cell(row, kind, key) for kind, key in keys.values())]


def class_header(result: dict[str, Any]) -> list[str]:
    """Return the columns of the table per class."""
    return ["class", *_COUNTS.values(), *_class_columns(result)]


_COUNTS = {"n_train": "train", "n_test": "test"}


def _class_columns(result: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return {heading: (kind, key)}, of the kinds that were measured."""
    names = {"knn": "k-NN", "recall_at_1": "nearest neighbor"}
    kinds = [kind for kind in KINDS[:2] if isinstance(result.get(kind), dict)]
    return {f"{kind} {name}": (kind, key) for key, name in names.items() for kind in kinds if key in result[kind]}


def cell(result: dict[str, Any], kind: str, key: str) -> str:
    """Return "61.0 ± 2.4 (~+0.3)": percent, half its 95 % interval, change from base; "" if it was not measured."""
    value = number(_at(result, kind, key))
    if value is None:
        return ""
    low, high = (number(_at(result, "intervals", kind, key, i)) for i in (0, 1))
    text = f"{value:.1f}" if low is None or high is None else f"{value:.1f} ± {(high - low) / 2:.1f}"
    points = number(_at(result, "gains", kind, key, "points"))
    if points is None:
        return text
    mark = "~" if _at(result, "gains", kind, key, "within_error") is True else ""
    return f"{text} ({mark}{round(points, 1) + 0.0:+.1f})"  # + 0.0 turns -0.0 into 0.0


def _at(values: Any, *keys: str | int) -> Any:
    for key in keys:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            return None
    return values


def tables(result: dict[str, Any], classes: int = WORST) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield (title, header, rows) for each measure, and for the worst classes, so many of them at most."""
    for measure, names in NAMES.items():
        if rows := list(rows_of(result, measure)):
            yield TITLES[measure], ["features", *names.values()], rows
    if rows := list(class_rows(result)):
        title = f"classes, the worst {classes} of {len(rows)}" if len(rows) > classes else "classes, the worst first"
        yield title, class_header(result), rows[:classes]


def print_measures(result: dict[str, Any]) -> None:
    """Print the tables."""
    for title, header, rows in tables(result):
        table = terminal.Table(title=title)
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        terminal.show(table)
