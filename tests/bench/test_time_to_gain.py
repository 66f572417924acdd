"""The tables of time to gain, from rows whose answers are known."""

import json

import pytest


@pytest.fixture(scope="module")
def tables(bench):
    return bench("time_to_gain_table")


@pytest.fixture(scope="module")
def row(bench):
    gains = bench("time_to_gain").gains
    return lambda *args: (lambda made: made | {"gains": gains(made["scores"])})(row_of(*args))


def row_of(arm, steps, seconds, gain, data="a", seed=0):
    scores = {"base": {"knn": 50.0, "knn_whitened": 52.0}, "source": {"base": 90.0, "adapted": 89.0, "ensemble": 90.5}}
    scores |= {model: {"knn": 50 + gain, "knn_whitened": 51 + gain} for model in ("adapted", "ensemble")}
    return {"key": [arm, data, seed, steps], "process": seconds, "scores": scores}


def test_seconds_until_a_gain_lie_on_the_line_between_two_runs(tables):
    curve = [(40.0, 6.0), (20.0, 4.0)]
    assert tables.time_until(curve, 2.0) == 10.0
    assert tables.time_until(curve, 5.0) == 30.0
    assert tables.time_until(curve, 6.5) is None


def test_tables(tables, row, tmp_path, monkeypatch, capsys):
    rows = [row("plain", 10, 100, 5), row("plain", 20, 200, 10), row("fast", 10, 30, 9), row("old", 10, 90, 3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "rows.jsonl")])
    tables.main()
    said = capsys.readouterr().out.splitlines()
    assert "| a | plain | 20 | 1 | 200 | +2.0 | +10.0 | +10.0 | +11.0 | +11.0 | -1.0 | +0.5 |" in said
    assert "| a | 0 | adapted | +9.0 | 180 | fast | 30 | 6.0 |" in said
    assert "| a | 0 | adapted | +9.0 | 180 | old | not reached | |" in said
