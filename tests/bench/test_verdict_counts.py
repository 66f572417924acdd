"""bench/results/verdict.json is what verdict_counts.py counts over the stored runs."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def test_the_counts_are_those_of_the_stored_runs(bench):
    tool = bench("verdict_counts")
    counts = tool.counts([RESULTS / f"study_cpu{i}.jsonl" for i in (2, 3)])
    counts["vicreg"] = tool.recipe_counts(RESULTS / "time_to_gain_cpu.jsonl")
    assert counts == json.loads((RESULTS / "verdict.json").read_text())
    assert sum(group["n"] for group in counts["runs"].values()) == 40
    assert sum(group["n"] for group in counts["words"].values()) == 40
    assert tool.page(counts) == (RESULTS / "verdict.md").read_text()


def test_shares_have_scipys_interval():
    stats = pytest.importorskip("scipy.stats")
    counts = json.loads((RESULTS / "verdict.json").read_text())
    groups = [
        group for key in ("runs", "adapters", "left_out", "words", "words_left_out") for group in counts[key].values()
    ]
    assert len(groups) == 15
    for group in groups:
        if group["n"]:
            exact = stats.binomtest(group["gained"], group["n"]).proportion_ci(method="wilson")
            assert group["share_gained_95"] == pytest.approx([100 * exact.low, 100 * exact.high], abs=0.051)
