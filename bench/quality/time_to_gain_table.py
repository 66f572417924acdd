"""Tables of the rows of time_to_gain.py: gains by arm, steps and set, and the time until a share of the script's gain.

    python bench/quality/time_to_gain_table.py ROWS.jsonl [--share 0.9]

The time until a gain is that of the straight line between neighboring runs of one arm, from the time of no steps: 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("adapted", "ensemble", "adapted whitened", "ensemble whitened")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("--share", type=float, default=0.9, help="of the script's gain after its most steps")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    print("\n".join([*gains_table([row for row in rows if "scores" in row]), "", *time_table(rows, options.share)]))


def forgetting(row: Row) -> list[float]:
    """Return the change on the model's own domain in points of k-NN: of the adapted model and of the ensemble."""
    source = row["scores"]["source"]
    return [source[model] - source["base"] for model in ("adapted", "ensemble")]


def gains_table(rows: list[Row]) -> list[str]:
    """Return the lines of the table of gains, means over the seeds."""
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        arm, data, _, steps = row["key"]
        groups[data, arm, steps].append(row)
    lines = [
        "| set | arm | steps | seeds | processor s | whitening alone | adapted | ensemble | adapted w. | ensemble w. "
        "| own domain, adapted | own domain, ensemble |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (data, arm, steps), group in sorted(groups.items()):
        found = [[row["gains"][kind] for kind in ("base whitened", *KINDS)] + forgetting(row) for row in group]
        means = [statistics.mean(values) for values in zip(*found, strict=True)]
        seconds = statistics.mean(row["process"] for row in group)
        cells = " | ".join(f"{value:+.1f}" for value in means)
        lines.append(f"| {data} | {arm} | {steps} | {len(group)} | {seconds:.0f} | {cells} |")
    return lines


def time_until(curve: list[tuple[float, float]], gain: float) -> float | None:
    """Return the seconds at which a curve of (seconds, gain) reaches a gain; None: it does not."""
    before = (0.0, 0.0)
    for point in sorted(curve):
        if point[1] >= gain:
            share = (gain - before[1]) / (point[1] - before[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def time_table(rows: list[Row], share: float) -> list[str]:
    """Return the lines of the table of processor seconds until `share` of the script's gain, as ratios to its own."""
    curves: dict[tuple[str, int, str, str], list[tuple[float, float, int]]] = defaultdict(list)
    for row in rows:
        if "scores" in row:
            arm, data, seed, steps = row["key"]
            for kind in KINDS:
                curves[data, seed, kind, arm].append((row["process"], row["gains"][kind], steps))
    lines = [
        f"| set | seed | features | {share:.0%} of the script's gain | script s | arm | s | script / arm |",
        "|---|--:|---|--:|--:|---|--:|--:|",
    ]
    for data, seed, kind, arm in sorted(curves):
        script = curves.get((data, seed, kind, "plain"))
        if arm == "plain" or not script:
            continue
        target = share * max(script, key=lambda point: point[2])[1]
        own = time_until([point[:2] for point in script], target)
        found = time_until([point[:2] for point in curves[data, seed, kind, arm]], target)
        if target > 0 and own is not None:
            shown = "not reached |" if found is None else f"{found:.0f} | {own / found:.1f}"
            lines.append(f"| {data} | {seed} | {kind} | {target:+.1f} | {own:.0f} | {arm} | {shown} |")
    return lines


if __name__ == "__main__":
    main()
