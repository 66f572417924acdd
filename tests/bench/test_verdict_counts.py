"""bench/results/verdict.json is what verdict_counts.py counts over the stored runs."""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_the_counts_are_those_of_the_stored_runs(bench):
    counts = bench("verdict_counts").counts([RESULTS / f"study_cpu{i}.jsonl" for i in (2, 3)])
    assert counts == json.loads((RESULTS / "verdict.json").read_text())
    assert sum(group["n"] for group in counts["runs"].values()) == 40
