"""k-NN and linear probe against scikit-learn, the ensemble's identity."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from upstep_fast.data.labeled.splits import held_out
from upstep_fast.evaluation import classifiers, figures, logistic
from upstep_fast.evaluation.classifiers import PROBE_HELD_OUT, PROBE_WEIGHTS, knn, linear_probe, probe
from upstep_fast.evaluation.features import Features, ensemble
from upstep_fast.evaluation.logistic import fit_logistic


def clusters(n, classes=5, width=12, noise=0.9, seed=0):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (n,), generator=g)
    x = F.normalize(centers[y] + noise * torch.randn(n, width, generator=g), dim=-1)
    return Features(x, y, tuple("abcde"[:classes]))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_matches_scikit_learn(k):
    train, test = clusters(400), clusters(150, seed=1)

    def votes(distance):  # Euclidean distance of unit vectors: similarity = 1 - d^2 / 2
        return np.exp((1 - distance**2 / 2) / 0.07)

    oracle = KNeighborsClassifier(k, weights=votes, algorithm="brute").fit(train.x.double().numpy(), train.y.numpy())
    expected = 100 * oracle.score(test.x.double().numpy(), test.y.numpy())
    assert 40 < expected < 100
    assert knn(train, test, k) == pytest.approx(expected, abs=1e-3)


def test_knn_limits_k_to_the_bank():
    train, test = clusters(8), clusters(20, seed=1)
    assert knn(train, test, k=20) == knn(train, test, k=8)


@pytest.mark.parametrize("l2", PROBE_WEIGHTS)
@pytest.mark.parametrize(("num", "width", "classes", "noise"), [(300, 12, 5, 0.9), (40, 64, 3, 0.5), (400, 6, 2, 2.0)])
def test_logistic_regression_is_scikit_learns_converged(l2, num, width, classes, noise):
    train = clusters(num, classes, width, noise)
    x = (train.x - train.x.mean(0)) / train.x.std(0)
    ours = fit_logistic(x, train.y, classes, l2)
    # scikit-learn minimizes sum CE + |W|^2 / (2 C); of two classes it fits w = w_1 - w_0, |W|^2 = |w|^2 / 2
    inverse = (2 if classes == 2 else 1) / (l2 * num)
    oracle = LogisticRegression(C=inverse, tol=1e-9, max_iter=20_000).fit(x.double().numpy(), train.y.numpy())
    theirs = oracle.predict_proba(x.double().numpy())
    assert ours.converged
    np.testing.assert_allclose(ours.scores(x).softmax(-1).numpy(), theirs, atol=1e-3)
    start = fit_logistic(x, train.y, classes, 10 * l2)
    again = fit_logistic(x, train.y, classes, l2, start)
    np.testing.assert_allclose(again.scores(x).softmax(-1).numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("width", [12, 400])
def test_the_probe_is_that_of_converged_fits(width):
    """Also with fewer images than dimensions, where the fit runs in the span of the images."""
    train, test = clusters(200, width=width, noise=0.9 if width == 12 else 0.3), clusters(150, width=width, seed=1)
    mean, std = train.x.mean(0), train.x.std(0, correction=0)
    x, x_test = (((z - mean) / std).double().numpy() for z in (train.x, test.x))
    out, y = held_out(train.y, PROBE_HELD_OUT, 0).numpy(), train.y.numpy()

    def fit(x, y, l2):
        return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-9, max_iter=20_000).fit(x, y)

    best = max(sorted(PROBE_WEIGHTS), key=lambda l2: fit(x[~out], y[~out], l2).score(x[out], y[out]))
    found = probe(train, test)
    assert found.l2 == best and found.converged
    right = fit(x, y, best).predict(x_test) == test.y.numpy()
    assert (found.right.numpy() == right).all()
    assert linear_probe(train, test) == pytest.approx(100 * right.mean())


def test_a_fit_that_has_not_converged_says_so(monkeypatch):
    monkeypatch.setattr(logistic, "NEWTON_STEPS", 1)
    train = clusters(100)
    assert not fit_logistic(train.x, train.y, 5, 1e-5).converged
    found = probe(train, clusters(50, seed=1))
    notes = list(figures.probe_notes({"base": {"linear": figures.probe_facts(found)}}))
    assert not found.converged and notes[0] == "the linear probe has not converged: base linear"


@pytest.mark.parametrize(("best", "at_edge"), [(1e-5, True), (1e-3, False), (1e-1, True)])
def test_an_edge_of_the_grid_is_said(monkeypatch, best, at_edge):
    """Planted fits: a weight is the better the nearer it is to `best`."""
    train = clusters(100)

    monkeypatch.setattr(classifiers, "_right", lambda model, x, y: torch.arange(len(x)) < model.share * len(x))
    monkeypatch.setattr(
        classifiers,
        "fit_logistic",
        lambda x, y, classes, l2, start=None: SimpleNamespace(
            converged=True, share=1 - 0.1 * abs(math.log10(l2 / best))
        ),
    )
    found = probe(train, train)
    assert found.l2 == best and found.at_edge == at_edge
    notes = list(figures.probe_notes({"adapted": {"linear_whitened": figures.probe_facts(found)}}))
    assert len(notes) == at_edge and all(f"{best:g}" in note and "adapted linear whitened" in note for note in notes)


def test_probe_chooses_on_train_alone():
    train, test = clusters(300), clusters(200, seed=1)
    score = linear_probe(train, test)
    wrong_labels = Features(test.x, (test.y + 1) % 5, test.classes)
    # the choice cannot see the test labels: predictions are the same, so the two scores cannot overlap
    assert score + linear_probe(train, wrong_labels) <= 100
    assert score > 60
    mask = held_out(train.y, PROBE_HELD_OUT, 0)
    assert 0.15 < mask.float().mean() < 0.25
    assert len(PROBE_WEIGHTS) > 1


def test_the_probe_chooses_by_file(monkeypatch):
    """No file has images on both sides of the choice, and files are on both."""
    train, sides = clusters(100), []
    groups = np.arange(100) // 5  # twenty files of five classes each
    monkeypatch.setattr(classifiers, "_right", lambda model, x, y: sides.append(x) or torch.ones(len(x)))
    probe(train, train, groups=groups)
    mean, std = train.x.mean(0), train.x.std(0, correction=0)
    rows = ((train.x - mean) / std)[:, None].isclose(sides[0], atol=1e-5).all(-1).any(1).numpy()
    files = {(label, file) for label, file in zip(train.y.tolist(), groups, strict=True)}
    out = {(label, file) for label, file, row in zip(train.y.tolist(), groups, rows, strict=True) if row}
    kept = {(label, file) for label, file, row in zip(train.y.tolist(), groups, rows, strict=True) if not row}
    assert rows.sum() == len(sides[0]) and out and kept and not out & kept and out | kept == files


def test_probe_with_one_image_a_class():
    train = Features(torch.eye(4), torch.arange(4), tuple("abcd"))
    assert linear_probe(train, train) == 100.0


def test_ensemble_cosine_is_the_mean_cosine():
    a, b = clusters(20).x, clusters(20, seed=3).x
    joined = ensemble(a, b)
    torch.testing.assert_close(joined @ joined.T, (a @ a.T + b @ b.T) / 2)
