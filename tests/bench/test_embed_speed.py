"""The table of embedding speed in the results is that of the stored run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_shows_the_stored_run():
    text = (ROOT / "docs/results.md").read_text()
    stored = json.loads((ROOT / "bench/results/embed_speed_busy_cpu2.json").read_text())["results"]
    assert len(stored) == 2
    for jobs in stored.values():
        for job, found in jobs.items():
            ratio = f", {found['cpu_ms'] / jobs['ours']['cpu_ms']:.2f}x ours" if job != "ours" else ""
            assert f"| {found['cpu_ms']:.2f}{ratio} |" in text, job
            assert found["cosine"] > 0.999
