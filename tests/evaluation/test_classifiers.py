"""k-NN and linear probe against scikit-learn, the ensemble's identity."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from upstep_fast.data.labeled.splits import held_out
from upstep_fast.evaluation.classifiers import PROBE_HELD_OUT, PROBE_WEIGHTS, fit_logistic, knn, linear_probe
from upstep_fast.evaluation.features import Features, ensemble


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


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_logistic_regression_matches_scikit_learn(l2):
    train = clusters(300)
    ours = fit_logistic(train.x, train.y, 5, l2, iterations=500)
    # scikit-learn minimizes sum CE + |W|^2 / (2 C)
    oracle = LogisticRegression(C=1 / (l2 * 300), tol=1e-8, max_iter=5000).fit(
        train.x.double().numpy(), train.y.numpy()
    )
    theirs = oracle.predict_proba(train.x.double().numpy())
    np.testing.assert_allclose(ours(train.x).softmax(-1).detach().numpy(), theirs, atol=5e-3)


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


def test_probe_with_one_image_a_class():
    train = Features(torch.eye(4), torch.arange(4), tuple("abcd"))
    assert linear_probe(train, train) == 100.0


def test_ensemble_cosine_is_the_mean_cosine():
    a, b = clusters(20).x, clusters(20, seed=3).x
    joined = ensemble(a, b)
    torch.testing.assert_close(joined @ joined.T, (a @ a.T + b @ b.T) / 2)
