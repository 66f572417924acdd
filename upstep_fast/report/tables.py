"""Result tables of eval and bench."""

from __future__ import annotations

from typing import Any

from upstep_fast.runtime import terminal


def print_scores(result: dict[str, Any]) -> None:
    """Print the result of `evaluate` in percent, with changes in points from the base model's unwhitened features."""
    table = terminal.Table(title=f"{result['n_train']} train, {result['n_test']} test images, k = {result['k']}")
    table.add_column("features")
    kinds = [kind for kind in ("base", "adapted", "ensemble") if kind in result]
    columns = {
        title: {kind: result[kind][key] for kind in kinds}
        for measure in ("knn", "linear")
        for title, key in ((measure, measure), (f"{measure}, whitened", f"{measure}_whitened"))
    }
    if "source" in result:
        columns |= {"source knn": result["source"], "source knn, whitened": result["source_whitened"]}
    for name in columns:
        table.add_column(name, justify="right")
    for kind in kinds:
        cells = []
        for title, row in columns.items():
            unwhitened = columns[title.removesuffix(", whitened")]
            # + 0.0 turns -0.0 into 0.0
            points = round(row[kind] - unwhitened["base"], 1) + 0.0
            change = "" if kind == "base" and row is unwhitened else f" ({points:+.1f})"
            cells.append(f"{row[kind]:.1f}{change}")
        table.add_row(kind, *cells)
    terminal.show(table)


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
                f"{result[kind][0]['median_ms'] / row['median_ms']:.2f}x",
                "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}",
                f"{row['error']:.1e}",
            )
        terminal.show(table)
    print(f"on {card.get('gpu', card['processor'])}, {card['threads']} threads, torch {card['torch']}")
