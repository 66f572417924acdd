"""Verdicts: intervals, outcomes, the measured accuracy against scikit-learn, and what the texts promise."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from upstep_fast.evaluation import verdict
from upstep_fast.evaluation.intervals import gain_interval
from upstep_fast.evaluation.label_free import CLEARLY_WORSE, DRIFT, judge, linear_cka, predicted_gain, views_found

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def random_views(num=60, width=12, noise=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, width, generator=generator)
    return torch.stack([x + noise * torch.randn(num, width, generator=generator) for _ in range(2)])


def test_the_gain_is_the_predicted_gain_of_the_validations():
    base, adapted = random_views(), random_views(noise=0.3)
    given = verdict.label_free_verdict(base, adapted)
    assert given.gain == pytest.approx(predicted_gain(judge(base, adapted)), abs=1e-9)
    assert given.low < given.gain < given.high and given.images == 60 and given.kind == "label-free"


def test_unchanged_features_are_no_measurable_change():
    base = random_views()
    given = verdict.label_free_verdict(base, base * (1 + 1e-7))
    assert given.outcome == "no measurable change" and given.text.startswith("no measurable change: ")
    assert given.low < 0 < given.high and "+0.0 (" in given.text and "-0.0" not in given.text


def test_the_interval_is_that_of_paired_gains_where_both_views_agree(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.rand(80, generator=generator) < p for p in (0.4, 0.7))
    found = iter([after, before])
    monkeypatch.setattr(verdict, "views_found", lambda x, y: torch.stack([right := next(found), right]))
    base = random_views(80)
    given = verdict.label_free_verdict(base, base)
    assert [given.low, given.high] == pytest.approx(gain_interval(before, after), abs=1e-6)


def test_clearer_views_are_better_and_a_collapse_is_worse():
    base = random_views(200, noise=1.2)
    signal = torch.stack([base.mean(0)] * 2)
    better = verdict.label_free_verdict(base, 0.2 * base + 0.8 * signal)
    assert better.outcome == "better" and better.low > 0
    collapsed = verdict.label_free_verdict(base, torch.ones_like(base) + 1e-3 * torch.randn(2, 200, 12))
    assert collapsed.outcome == "worse" and collapsed.gain < CLEARLY_WORSE
    broken = verdict.label_free_verdict(base, torch.full_like(base, torch.nan))
    assert broken.outcome == "worse" and broken.gain == -100 - DRIFT and json.loads(verdict.to_json(broken, None))


@pytest.mark.parametrize("gain", [-30.0, -14.9, 0.0, 2.0])
def test_worse_needs_strong_evidence(gain, monkeypatch):
    monkeypatch.setattr(verdict, "linear_cka", lambda x, y: 1 + gain / DRIFT)
    base = random_views(400, noise=0.1)
    given = verdict.label_free_verdict(base, base)
    assert given.gain == pytest.approx(gain)
    assert given.outcome == ("worse" if gain < CLEARLY_WORSE else "better" if gain > 1 else "no measurable change")


def test_measured_accuracy_is_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(60) % 3
    models = [F.normalize(F.one_hot(y, 8) * s + torch.randn(60, 8, generator=generator), dim=-1) for s in (1.0, 2.5)]
    labels = [*(f"class {i}" for i in y.tolist()), "alone"]
    given = verdict.measured_verdict(*(torch.cat([x, x[:1]]) for x in models), labels)
    right = []
    for x in models:
        found = []
        for i in range(60):
            others = np.arange(60) != i
            model = neighbors.KNeighborsClassifier(
                10, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07), algorithm="brute"
            )
            found.append(model.fit(x[others].numpy(), y[others].numpy()).predict(x[i : i + 1].numpy())[0] == int(y[i]))
        right.append(torch.tensor(found))
    percents = [100 * r.double().mean().item() for r in right]
    assert given.gain == pytest.approx(percents[1] - percents[0]) and given.images == 60 and given.kind == "measured"
    assert [given.low, given.high] == gain_interval(*right) and given.outcome == "better"
    assert f"{percents[0]:.1f} -> {percents[1]:.1f} %" in given.text and "60 held-out images of 3 classes" in given.text


def test_pictures_of_one_file_are_no_neighbors_of_each_other():
    """Each file is a point of its own, so only its own pictures would tell its class."""
    generator = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(12, 64, generator=generator), dim=-1)
    x = F.normalize(points.repeat_interleave(5, 0) + 0.01 * torch.randn(60, 64, generator=generator), dim=-1)
    labels, files = [f"class {i // 5 % 2}" for i in range(60)], np.arange(60) // 5
    assert "100.0 -> 100.0 %" in verdict.measured_verdict(x, x, labels).text
    given = verdict.measured_verdict(x, x, labels, files)
    y = torch.tensor([int(label[-1]) for label in labels])
    weights = ((x @ x.T - 1) / 0.07).exp() * (torch.from_numpy(files)[:, None] != torch.from_numpy(files))
    kept = weights * (weights >= weights.topk(10).values[:, -1:])
    accuracy = 100 * ((kept @ F.one_hot(y).float()).argmax(1) == y).double().mean()
    assert f"{accuracy:.1f} -> {accuracy:.1f} %" in given.text and accuracy < 90
    assert "60 held-out images of 2 classes, each among the others of other files; 12 files, whose pic" in given.text


def test_too_few_labels_measure_nothing():
    x = F.normalize(torch.randn(20, 4), dim=-1)
    assert verdict.measured_verdict(x, x, ["a"] * 20) is None
    assert verdict.measured_verdict(x, x, [str(i) for i in range(20)]) is None
    assert verdict.measured_verdict(x, x, ["a", "b"] * 7 + [str(i) for i in range(6)]) is None


def test_the_texts_promise_what_was_counted():
    counted = json.loads((RESULTS / "verdict.json").read_text())
    words = counted["words"] | {"worse": counted["adapters"]["clearly_worse"]}
    for word, counts in words.items():
        assert verdict.STORED["clustering"][word] == (counts["gained"], counts["lost"], counts["n"])
    recipe = {word: counts for word, counts in counted["vicreg"]["words"].items() if counts["n"]}
    assert verdict.STORED["vicreg"] == {
        word: (counts["gained"], counts["lost"], counts["n"]) for word, counts in recipe.items()
    }
    # "better" alone is for a word that is right nearly always
    low, _ = counted["words"]["better"]["share_gained_95"]
    views = random_views(200, noise=1.2)
    given = verdict.label_free_verdict(views, 0.2 * views + 0.8 * torch.stack([views.mean(0)] * 2))
    assert low < 95 and given.outcome == "better" and given.text.startswith("probably better: label-free score +")
    assert given.text.endswith("an estimate: of 14 stored runs like this, 11 gained k-NN accuracy and 0 lost")


@pytest.mark.parametrize(
    ("score", "low", "images", "objective", "outcome"),
    [
        (0.5, -3.0, 64, "vicreg", "better"),
        (0.5, -3.0, 63, "vicreg", "no measurable change"),
        (0.5, -3.0, 64, "clustering", "no measurable change"),
        (4.0, 0.5, 16, "clustering", "better"),
        (0.0, -3.0, 64, "vicreg", "no measurable change"),
        (-15.1, -20.0, 64, "vicreg", "worse"),
    ],
)
def test_words_of_a_score(score, low, images, objective, outcome):
    assert verdict.score_outcome(score, low, images, objective) == outcome


@pytest.mark.parametrize("images", [63, 64])
def test_few_images_of_a_run_by_vicreg_promise_nothing(images):
    views = random_views(images, noise=1.2)
    given = verdict.label_free_verdict(views, 0.2 * views + 0.8 * torch.stack([views.mean(0)] * 2), "vicreg")
    assert given.outcome == "better"
    assert given.text.endswith("; too few images for an estimate, which takes 64") == (images < 64)
    assert ("stored runs like this" in given.text) == (images == 64)


def test_views_are_found_both_ways():
    x, y = random_views(30)
    x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    similarity = (x @ y.T).numpy()
    found = views_found(x, y)
    assert found[0].tolist() == [int(similarity[:, i].argmax()) == i for i in range(30)]
    assert found[1].tolist() == [int(similarity[i].argmax()) == i for i in range(30)]
    assert linear_cka(x, x) == pytest.approx(1.0)


@pytest.mark.parametrize(("interval", "outcome"), [((1.0, 7.4), "better"), ((-1.0, 3.0), "no m"), ((-9.0, -1.0), "wo")])
def test_what_eval_measured_as_a_verdict(interval, outcome):
    scores = {"base": {"knn": 60.0}, "adapted": {"knn": 64.2}, "n_test": 597}
    given = verdict.eval_verdict(scores | {"gains": {"adapted": {"knn": {"interval": list(interval)}}}})
    assert given.text.startswith(outcome) and "60.0 -> 64.2 % (+4.2 points, 95 % interval" in given.text
    assert (given.low, given.high, given.images, given.kind) == (*interval, 597, "measured")
