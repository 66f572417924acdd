"""Intervals against scipy and exact enumeration, and the notes on figures that mean little."""

import json
import math
import shutil

import pytest
import torch
from scipy.stats import binom, binomtest

from upstep_fast import evaluate
from upstep_fast.cli.commands import main
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.evaluation import figures, labeled
from upstep_fast.evaluation.intervals import accuracy_interval, gain_interval


def of(right, n):
    return torch.arange(n) < right


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 1), (3, 12), (61, 100), (5999, 6000)])
def test_the_interval_of_an_accuracy_is_wilsons(right, n):
    expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert accuracy_interval(of(right, n)) == pytest.approx([100 * expected.low, 100 * expected.high], abs=1e-9)


def pair(lost, won, n):
    """Images of which the second model loses `lost` and wins `won`."""
    before = of(lost, n)
    return before, (torch.arange(n) >= n - won)


def test_the_interval_of_a_gain_in_closed_form():
    # Agresti and Min: cells 3.5 and 10.5 of 102 images
    d = 7 / 102
    half = 1.959964 * math.sqrt((14 - 102 * d**2) / 102**2)
    assert gain_interval(*pair(3, 10, 100)) == pytest.approx([100 * (d - half), 100 * (d + half)], abs=1e-4)
    assert gain_interval(*pair(0, 0, 10))[0] < 0 < gain_interval(*pair(0, 0, 10))[1]
    assert gain_interval(*pair(0, 5, 5))[1] == 100.0
    low, high = gain_interval(*pair(10, 3, 100))
    assert gain_interval(*pair(3, 10, 100)) == pytest.approx([-high, -low])


@pytest.mark.parametrize(
    ("n", "p_lost", "p_won"), [(20, 0.1, 0.3), (60, 0.02, 0.05), (60, 0.1, 0.1), (200, 0.01, 0.03)]
)
def test_the_interval_of_a_gain_holds_the_truth_95_times_of_100(n, p_lost, p_won):
    """Exact: the sum over all outcomes of the trinomial distribution."""
    covered, truth = 0.0, 100 * (p_won - p_lost)
    for lost in range(n + 1):
        p = binom.pmf(lost, n, p_lost)
        if p < 1e-9:
            continue
        for won in range(n - lost + 1):
            q = binom.pmf(won, n - lost, p_won / (1 - p_lost))
            if p * q > 1e-9:
                low, high = gain_interval(*pair(lost, won, n))
                covered += p * q * (low <= truth <= high)
    assert 0.935 < covered < 0.995


def test_gains_are_against_the_unwhitened_base_on_the_same_images():
    right = {
        "base": {"knn": of(50, 100), "knn_whitened": of(80, 100)},
        "adapted": {"knn": of(52, 100), "knn_whitened": of(50, 100)},
    }
    percents, details = figures.with_intervals(right)
    assert percents["base"] == pytest.approx({"knn": 50, "knn_whitened": 80})
    gains = details["gains"]
    assert gains["base"].keys() == {"knn_whitened"} and gains["base"]["knn_whitened"]["points"] == pytest.approx(30)
    assert not gains["base"]["knn_whitened"]["within_error"]
    assert gains["adapted"]["knn"]["points"] == pytest.approx(2) and gains["adapted"]["knn"]["within_error"]
    assert gains["adapted"]["knn_whitened"]["points"] == 0 and details["intervals"].keys() == right.keys()


@pytest.fixture
def signs(photos, tmp_path):
    """train/ of 6 + 6 and test/ of 3 + 3 pictures."""

    def make(train=6, test=3, classes=("a", "b"), equal=0):
        root, at = tmp_path / "signs", iter(sorted(photos.iterdir()))
        for split, count in (("train", train), ("test", test)):
            for name in classes:
                (root / split / name).mkdir(parents=True)
                for _ in range(count):
                    path = next(at)
                    shutil.copy(path, root / split / name / path.name)
        for path in sorted((root / "train" / classes[0]).iterdir())[:equal]:
            shutil.copy(path, root / "test" / classes[0] / f"copy-{path.name}")
        return root

    return make


@pytest.mark.parametrize(
    ("data", "k", "expected"),
    [
        (dict(), 3, ()),
        (dict(), 20, ("k: 20 neighbors were asked for, there are 12 training images",)),
        (dict(equal=2), 3, ("2 of 8 test images are training images too",)),
    ],
)
def test_what_makes_the_figures_mean_little_is_said(model, signs, capsys, tmp_path, data, k, expected):
    with pytest.raises(SystemExit) as stop:
        main(f"eval --model {model} --data {signs(**data)} --k {k} --device cpu --json {tmp_path / 's.json'}".split())
    scores, out = json.loads((tmp_path / "s.json").read_text()), capsys.readouterr().out
    assert stop.value.code == 0
    data_notes = [note for note in scores["notes"] if "linear" not in note and "L2" not in note]
    assert len(data_notes) == len(expected)
    for note, start in zip(data_notes, expected, strict=True):
        assert note.startswith(start) and f"note: {note}" in out
    assert scores["k"] == min(k, scores["n_train"])
    low, high = scores["intervals"]["base"]["knn"]
    assert low <= scores["base"]["knn"] <= high and f"± {(high - low) / 2:.1f}" in out
    assert set(scores["probe"]["base"]) == {"linear", "linear_whitened"}


def test_a_place_that_cannot_be_written_is_refused_before_images_are_read(model, tmp_path):
    (tmp_path / "folder").mkdir()
    for path, match in (("no/s.json", "json: no folder"), ("folder", "json: .* not a regular file")):
        with pytest.raises(ConfigError, match=match):
            evaluate(model, tmp_path / "no images", json=str(tmp_path / path), device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_the_table_is_printed_though_the_disk_is_full(model, signs, capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(labeled, "write_atomic", full)
    (tmp_path / "s.json").write_text("old")
    with pytest.raises(SystemExit) as stop:
        main(f"eval --model {model} --data {signs()} --device cpu --json {tmp_path / 's.json'}".split())
    out, err = capsys.readouterr()
    assert stop.value.code == RunFailedError.exit_code and "base" in out and (tmp_path / "s.json").read_text() == "old"
    assert err.splitlines()[-1] == f"upstep-fast: json: cannot write {tmp_path / 's.json'}: No space left on device"
