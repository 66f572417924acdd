"""The table of a step on a CPU is that of the stored run, whose ratios are those of its times."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_shows_the_stored_run():
    stored = json.loads((ROOT / "bench/results/step_on_cpu.json").read_text())
    text = (ROOT / "docs/results.md").read_text()
    assert len(stored["rows"]) == 6
    for row in stored["rows"]:
        times = row["ms"]
        peft = min(value for name, value in times.items() if name.startswith("peft"))
        assert row["peft / engine"] == pytest.approx(peft / times["engine"])
        low, high = row["spread"]["engine"]
        cells = (
            f"| {times['engine']:.0f} ({low:.0f}..{high:.0f}) | {row['peft / engine']:.2f} | {times['products']:.0f} |"
        )
        assert cells in text
