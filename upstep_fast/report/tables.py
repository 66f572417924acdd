"""Result tables of eval and bench."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upstep_fast.errors import printable
from upstep_fast.report.measures import KINDS, cell, print_measures
from upstep_fast.runtime import terminal

if TYPE_CHECKING:
    from upstep_fast.evaluation.verdict import Verdict


def print_verdicts(verdict: Verdict | None, measured: Verdict | None) -> None:
    """Print the verdicts of a run, one line each."""
    for name, given in (("verdict", verdict), ("measured", measured)):
        if given is not None:
            terminal.print_line(f"{name}: {given.text}")
    if verdict is None:
        terminal.print_line(
            "verdict: none; `upstep-fast eval` compares the adapter with the base model on labeled images"
        )


def print_scores(result: dict[str, Any]) -> None:
    """Print the result of `evaluate` in percent, with changes in points from the base model's unwhitened features.

    An accuracy carries half its 95 % interval; a change whose interval holds 0 is marked. Notes follow the table.
    """
    if "iou" in result:
        print_segmentation(result)
        return
    table = terminal.Table(title=f"{result['n_train']} train, {result['n_test']} test images, k = {result['k']}")
    table.add_column("features")
    kinds = [kind for kind in KINDS if kind in result]
    columns: dict[str, dict[str, tuple[str, str]]] = {
        title: {kind: (kind, key) for kind in kinds}
        for measure in ("knn", "linear")
        for title, key in ((measure, measure), (f"{measure}, whitened", f"{measure}_whitened"))
        if key in result["base"]
    }
    if "source" in result:
        columns |= {"source knn": {kind: ("source", kind) for kind in kinds}}
        columns |= {"source knn, whitened": {kind: ("source_whitened", kind) for kind in kinds}}
    for name in columns:
        table.add_column(name, justify="right")
    for kind in kinds:
        table.add_row(kind, *(cell(result, *row[kind]) for row in columns.values()))
    if columns:
        terminal.show(table)
    print_measures(result)
    print("± half the 95 % interval; ~ within the error: the 95 % interval of the change holds 0")
    for note in result["notes"]:
        print(f"note: {printable(note)}")


def print_segmentation(result: dict[str, Any]) -> None:
    """Print the result of `evaluate` with masks, in percent."""
    images = f"{result['n_train']} train, {result['n_test']} test images"
    table = terminal.Table(title=f"{images}, {result['tokens']:,} tokens, k = {result['k']}")
    table.add_column("tokens")
    titles = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    keys = [
        (f"{title}{', whitened' * bool(suffix)}", key + suffix)
        for key, title in titles.items()
        for suffix in ("", "_whitened")
    ]
    for title, _ in keys:
        table.add_column(title, justify="right")
    for kind in (kind for kind in KINDS if kind in result):
        table.add_row(kind, *(cell(result, kind, key) for _, key in keys))
    terminal.show(table)
    print("± half the 95 % interval; ~ within the error: the 95 % interval of the change holds 0")


def print_timings(result: dict[str, Any]) -> None:
    """Print the result of `benchmark.run`: medians with quartiles, and speed-ups over the first variant."""
    card = result["device"]
    for kind in ("backward", "forward"):
        table = terminal.Table(
            title=f"{'forward and backward' if kind == 'backward' else 'forward'}, {result['config']['model']}"
        )
        for column in ("variant", "ms (quartiles)", "speed-up", "peak GiB", "error"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        for row in result[kind]:
            table.add_row(
                row["name"],
                f"{row['median_ms']:.1f} ({row['low_ms']:.1f}..{row['high_ms']:.1f})",
                # a coarse clock of processor time gives 0 for a model of a few milliseconds
                f"{result[kind][0]['median_ms'] / row['median_ms']:.2f}x" if row["median_ms"] else "-",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['error']:.1e}",
            )
        terminal.show(table)
    print(f"on {card.get('gpu', card['processor'])}, {card['threads']} threads, torch {card['torch']}")
