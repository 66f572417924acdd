"""The table of embedding speed in the results is that of the stored run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_shows_the_stored_run():
    text = (ROOT / "docs/results.md").read_text()
    stored = json.loads((ROOT / "bench/results/embed_speed_cpu2.json").read_text())["results"]
    assert len(stored) == 2
    for jobs in stored.values():
        for job, found in jobs.items():
            ratio = f", {found['cpu_ms'] / jobs['ours']['cpu_ms']:.2f}x ours" if job != "ours" else ""
            assert f"| {found['cpu_ms']:.2f}{ratio} |" in text, job
            assert found["cosine"] > 0.999


def test_a_round_whose_wall_time_is_noise_gives_no_rate(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench/evaluation"))
    import embed_speed

    noise, run = {"wall": -0.1, "cpu": 2.0, "images": 20}, {"wall": 4.0, "cpu": 1.0, "images": 20}
    assert embed_speed._summary([noise])["images_per_s"] is None
    assert embed_speed._summary([noise, run]) == {
        "images_per_s": 5.0,
        "low": 5.0,
        "high": 5.0,
        "cpu_ms": 75.0,
        "cpu_ms_low": 50.0,
        "cpu_ms_high": 100.0,
    }
