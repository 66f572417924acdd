"""One page from the facts of the first run on a GPU: what is right, what is wrong, and the decisions to take.

python bench/gpu/summary.py FACTS.jsonl PAGE.md
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = ("ours", "triton", "fused", "measured")
NARROWER = ("ours ", "triton ")  # our other forms, such as "ours fp8": neither ours in this comparison nor rivals
FLOORS = ("copy", "bare")  # no rivals: they do less
CLOSE = 1.05  # a rival is faster where ours takes this many times its time


def write_page(path: Path, rows: list[Row], device: str = "cuda") -> None:
    """Write the page. rows: the facts, in any order."""
    parts = [_head(rows, device), _tasks(rows), _checks(rows), _ops(rows), _steps(rows), _kernels(rows)]
    path.write_text("\n\n".join(part for part in parts if part) + "\n")


def _head(rows: list[Row], device: str) -> str:
    card = next((row["card"] for row in rows if "card" in row), {})
    where = card.get("gpu") or card.get("processor", "unknown machine")
    ceilings = [
        f"copy {row['gigabytes_per_s']:,.0f} GB/s"
        if "gigabytes_per_s" in row
        else f"product {row['teraflops']:,.1f} TFLOP/s"
        for row in rows
        if "ceiling" in row
    ]
    title = "# First run on a GPU" if device == "cuda" else "# Rehearsal on a CPU: the plumbing, not the speed"
    versions = f"torch {card.get('torch')}, triton {card.get('triton')}"
    return f"{title}\n\n{where}, {versions}; {', '.join(ceilings) or 'no ceilings'}"


def _tasks(rows: list[Row]) -> str:
    ends = [row for row in rows if "status" in row]
    right = [row["task"] for row in ends if row["status"] == "right"]
    lines = [f"## Tasks: {len(right)} of {len(ends)} right", ""]
    for row in ends:
        if row["status"] != "right":
            why = f"expected: {row['expected']}" if row.get("expected") else "NEW"
            last = (row.get("output") or "").strip().splitlines()[-1:] or [""]
            lines.append(f"- **{row['task']}**: {row['status']} after {row['seconds']:.0f} s ({why}) `{last[0][:160]}`")
    tests = next((row["tests"] for row in rows if "tests" in row), None)
    if tests:
        lines.append("- tests: " + ", ".join(f"{count} {name.lower()}" for name, count in tests.items()))
    lines += [f"- test {row['outcome']}: `{row['test']}`" for row in rows if "test" in row]
    return "\n".join(lines)


def _checks(rows: list[Row]) -> str:
    checks = [row for row in rows if "passed" in row]
    if not checks:
        return ""
    lines = ["## Checks against float64", "", "| op | dtype | implementation | forward | backward | limit | |"]
    lines.append("|---|---|---|--:|--:|--:|---|")
    for row in checks:
        if row["passed"] is None:
            continue  # cannot run here; the reason is in the facts
        errors = [f"{row[half]:.1e}" if row[half] is not None else "" for half in ("forward", "backward")]
        verdict = "right" if row["passed"] else f"WRONG {row['note'][:80]}"
        name = row["implementation"] or " and ".join(row["ran"]) + " (chosen)"
        lines.append(
            f"| {row['op']} | {row['dtype']} | {name} | {errors[0]} | {errors[1]} | {row['limit']:.0e} | {verdict} |"
        )
    return "\n".join(lines)


def _ops(rows: list[Row]) -> str:
    groups: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if "group" in row:
            groups[row["group"]][row["variant"]] = row
    if not groups:
        return ""
    lines = [
        "## Ops",
        "",
        "| benchmark | ours, ms | of the floor (a copy) | fastest rival, ms | ours / rival |",
        "|---|--:|--:|---|--:|",
    ]
    decisions = []
    for group, variants in sorted(groups.items()):
        ours = _fastest({name: row for name, row in variants.items() if name in OURS})
        rival = _fastest({n: r for n, r in variants.items() if n not in OURS + FLOORS and not n.startswith(NARROWER)})
        if ours is None:
            continue
        time, floor = ours[1]["median_ms"], variants.get("copy")
        of_floor = f"{time / floor['median_ms']:.2f}x" if floor else ""
        beside = f"{rival[0]} {rival[1]['median_ms']:.3f}" if rival else ""
        ratio = time / rival[1]["median_ms"] if rival else None
        lines.append(f"| {group} | {time:.3f} | {of_floor} | {beside} | {f'{ratio:.2f}' if ratio else ''} |")
        if ratio is not None and rival is not None and ratio > CLOSE:
            decisions.append(
                f"- {group}: {rival[0]} is {ratio:.2f}x as fast as {ours[0]}; prefer it here, or tune {ours[0]}"
            )
    return "\n".join([*lines, "", "### Decisions to take", "", *(decisions or ["- none: no rival is faster"])])


def _fastest(variants: dict[str, Row]) -> tuple[str, Row] | None:
    return min(variants.items(), key=lambda item: item[1]["median_ms"], default=None)


def _steps(rows: list[Row]) -> str:
    steps = [row for row in rows if "kind" in row and "median_ms" in row]
    if not steps:
        return ""
    lines = [
        "## Step",
        "",
        "| task | half | variant | ms (quartiles) | over PEFT | peak, GB | error |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in steps:
        same = [r for r in steps if (r["task"], r["kind"]) == (row["task"], row["kind"])]
        peft = next((r["median_ms"] for r in same if r["variant"] == "peft"), None)
        over = f"{peft / row['median_ms']:.2f}x" if peft else ""
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if row["peak_bytes"] else ""
        spread = f"{row['median_ms']:.1f} ({row['low_ms']:.1f}..{row['high_ms']:.1f})"
        half = "forward and backward" if row["kind"] == "backward" else "forward"
        lines.append(f"| {row['task']} | {half} | {row['variant']} | {spread} | {over} | {peak} | {row['error']:.0e} |")
    return "\n".join(lines)


def _kernels(rows: list[Row]) -> str:
    kernels = [row for row in rows if "kernel" in row]
    if not kernels:
        return ""
    total = next(row for row in rows if "launches" in row)
    lines = [
        f"## Top kernels of {total['launches']:,} launches, {total['total_ms']:.1f} ms",
        "",
        "| kernel | calls | ms | share |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| `{row['kernel']}` | {row['calls']} | {row['ms']:.2f} | {100 * row['share']:.1f} % |" for row in kernels
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    facts = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    write_page(Path(sys.argv[2]), facts)
