"""Which part of the steps each rule of the gate leaves open, replayed on the center's magnitudes of recorded runs.

    python bench/quality/gate_rates.py --out bench/results/gate_rates.json RUN/metrics.jsonl ...

The magnitudes are those of the run as it was: what a rule skips would have moved them, which a replay cannot show.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import study

from upstep_fast.methods.gate import GateRule, GateState, decide

RULES = ("prev", "ema", "median", "quantile", "random", "alternate")
MIN_STEPS = 100


def magnitudes(path: Path) -> list[float]:
    """Of every step that has one, in order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["center"] for row in rows if row.get("center") is not None]


def opened(rule: GateRule, values: list[float]) -> float:
    """Return the fraction of steps on which the rule updates."""
    state = GateState()
    for m in values:
        _, state = decide(rule, state, (m,))
    return state.num_updates / len(values)


def main() -> None:
    """Write the smallest, median and largest part over the runs for each rule and direction, and the magnitudes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="metrics.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    runs = {path.parent.name: values for path in args.runs if len(values := magnitudes(path)) >= MIN_STEPS}
    if not runs:
        parser.error(f"no run of at least {MIN_STEPS} steps among {len(args.runs)} files")
    series = list(runs.values())
    result: dict[str, Any] = {"commit": study.commit(), "open": {}}
    for name in RULES:
        for direction in ("low", "high"):
            parts = sorted(opened(GateRule(name, update_when=direction), values) for values in series)
            low, high = parts[0], parts[-1]
            result["open"][f"{name} {direction}"] = {"min": low, "median": statistics.median(parts), "max": high}
            print(f"{name:10}{direction:5} {low:.2f} {statistics.median(parts):.2f} {high:.2f}")
    result["magnitudes"] = {name: [round(m, 4) for m in values] for name, values in runs.items()}
    args.out.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
