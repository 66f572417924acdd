"""Copies, outliers, wrong classes and leaks: the functions on arrays, against other libraries and closed forms."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor, NearestNeighbors

import upstep_fast
from upstep_fast.data.curation.copy_hashes import COUNT, are_copies, copy_hashes
from upstep_fast.data.curation.perceptual_hash import perceptual_hash
from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation.curation import duplicates, mislabeled, neighbors, outliers
from upstep_fast.evaluation.curation.leaks import leaks
from upstep_fast.evaluation.curation.neighbors import Neighbors, nearest
from upstep_fast.evaluation.search.exact import unit_rows


def clusters(seed=0, num=40, classes=3, width=16, spread=0.35):
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, width))
    y = np.repeat(np.arange(classes), num)
    return (centers[y] + spread * rng.normal(size=(classes * num, width))).astype(np.float32), y


@pytest.mark.parametrize("block", [1, 1 << 12, 64 << 20])
def test_nearest_are_those_of_scikit_learn(monkeypatch, block):
    monkeypatch.setattr(neighbors, "BLOCK_BYTES", block)
    x, _ = clusters()
    scale = np.float32(10.0) ** np.linspace(-30, 30, len(x), dtype=np.float32)  # cosines have none
    found = nearest(x * scale[:, None], 7)
    distance, index = NearestNeighbors(n_neighbors=7, metric="cosine").fit(x.astype(np.float64)).kneighbors()
    assert np.array_equal(found.index, index)
    np.testing.assert_allclose(found.similarity, 1 - distance, atol=1e-6)


def test_there_are_at_most_all_others():
    assert nearest(np.eye(3, dtype=np.float32), 20).index.shape == (3, 2)
    assert nearest(np.ones((1, 4), np.float32), 20).index.shape == (1, 0)


def test_neighbors_of_the_own_group_do_not_count():
    x = np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1]], np.float32)
    found = nearest(x, 3).without(np.array([0, 0, 2, 3]))
    assert [row[used].tolist() for row, used in zip(found.index, found.counts, strict=True)] == [
        [2, 3], [2, 3], [1, 0, 3], [2, 1, 0],
    ]  # fmt: skip
    assert found.first(1).sum(1).tolist() == [1, 1, 1, 1]


def test_components_are_those_of_scipy():
    scipy = pytest.importorskip("scipy.sparse")
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 200, (120, 2))
    graph = scipy.coo_matrix((np.ones(120), pairs.T), (200, 200))
    labels = scipy.csgraph.connected_components(graph, directed=False)[1]
    first = {label: i for i, label in reversed(list(enumerate(labels)))}
    assert duplicates.components(200, pairs).tolist() == [first[label] for label in labels]


def test_groups_of_equal_digests_and_which_image_is_kept():
    group = duplicates.exact_groups(["a", None, "b", "a", None, "b", "b"])
    assert group.tolist() == [0, 1, 2, 0, 4, 2, 2]
    assert duplicates.members(group) == [[0, 3], [2, 5, 6]]
    assert duplicates.kept([2, 5, 6], {2: 10, 5: 30, 6: 30}.get) == 5


def test_a_group_larger_than_the_list_of_candidates_is_one(monkeypatch):
    from types import SimpleNamespace

    from upstep_fast.evaluation.curation import curate

    rng = np.random.default_rng(0)
    x = np.concatenate([np.ones((60, 8)) + 1e-3 * rng.normal(size=(60, 8)), rng.normal(size=(30, 8))])
    hashes = {i: np.full(COUNT, 0 if i < 60 else rng.integers(1 << 62), np.uint64) for i in range(90)}
    images = SimpleNamespace(hashes=hashes, files=None, read_hashes=lambda indices: None)
    unit = unit_rows(x)
    group = curate._near(unit, np.arange(90), nearest(unit), 0.9, images)
    assert (group[:60] == 0).all() and len(set(group[60:])) == 30


def test_threshold_is_the_tenth_part_of_nearest_similarities():
    similarity = np.linspace(0.5, 1.0, 101, dtype=np.float32)[:, None]
    found = Neighbors(np.zeros((101, 1), np.int64), similarity, np.ones((101, 1), bool))
    assert duplicates.threshold(found) == pytest.approx(0.55)


def test_outlier_scores_are_the_closed_form():
    x, _ = clusters()
    distance = NearestNeighbors(n_neighbors=10, metric="cosine").fit(x.astype(np.float64)).kneighbors()[0].mean(1)
    distance = np.log(distance)
    spread = 1.4826 * np.median(np.abs(distance - np.median(distance)))
    np.testing.assert_allclose(
        outliers.outlier_scores(nearest(x)), (distance - np.median(distance)) / spread, atol=1e-4
    )


def test_planted_outliers_come_first_as_with_local_outlier_factor():
    x, _ = clusters(num=60)
    odd = np.random.default_rng(9).normal(size=(6, 16)).astype(np.float32) * 3
    x = np.concatenate([x, odd])
    z = outliers.outlier_scores(nearest(x))
    factor = LocalOutlierFactor(n_neighbors=10, metric="cosine").fit(x).negative_outlier_factor_
    assert set(np.argsort(-z)[:6]) == set(np.argsort(factor)[:6]) == set(range(180, 186))
    assert (z[180:] > outliers.LISTED).all()


def test_images_that_do_not_differ_have_no_outliers_but_an_odd_one_among_them_is_one():
    x = np.ones((20, 8), np.float32)
    assert not outliers.outlier_scores(nearest(x)).any()
    x[7] = np.arange(8)
    assert np.argmax(outliers.outlier_scores(nearest(x))) == 7
    assert outliers.outlier_scores(nearest(x))[7] > outliers.LISTED


def test_votes_are_those_of_scikit_learn_leaving_the_image_out():
    x, y = clusters(spread=1.0)
    y = y.copy()
    p = mislabeled.shares(nearest(x), y, 3)
    unit = unit_rows(x).astype(np.float64)

    def weights(distance):
        return np.exp(-distance / mislabeled.TEMPERATURE)

    for i in range(0, len(y), 7):
        rest = np.arange(len(y)) != i
        knn = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute").fit(unit[rest], y[rest])
        np.testing.assert_allclose(p[i], knn.predict_proba(unit[i : i + 1])[0], atol=1e-4)


# cleanlab 2.9.0: find_label_issues(y, p, filter_by="confident_learning", min_examples_per_class=0)
CLEANLAB = [1, 6, 22, 28, 42, 51, 62, 88, 93, 103, 109]


def shares_for_cleanlab():
    r, n = np.random.default_rng(3), 120
    y, p = r.integers(0, 4, n), r.dirichlet(np.ones(4), n)
    p += 2 * np.eye(4)[np.where(r.random(n) < 0.85, y, r.integers(0, 4, n))] * r.random((n, 1))
    return y, p / p.sum(1, keepdims=True)


def test_listed_classes_are_those_of_cleanlab():
    y, p = shares_for_cleanlab()
    assert np.flatnonzero(mislabeled.votes(p, y).listed).tolist() == CLEANLAB


def test_planted_label_errors_are_listed_first():
    x, truth = clusters(num=60)
    wrong = np.arange(0, len(truth), 12)
    y = truth.copy()
    y[wrong] = (truth[wrong] + 1) % 3
    found = mislabeled.votes(mislabeled.shares(nearest(x), y, 3), y)
    assert set(found.ranked()[: len(wrong)].tolist()) == set(wrong.tolist())
    assert np.array_equal(found.proposed[wrong], truth[wrong])


def test_a_class_of_one_image_and_an_empty_class_are_no_error():
    x, y = clusters(num=10, classes=2)
    y = y.copy()
    y[0] = 2
    found = mislabeled.votes(mislabeled.shares(nearest(x), y, 4), y)
    assert found.proposed.max() < 3 and np.isfinite(found.best).all()


def test_leaks_are_groups_on_both_sides():
    group = np.array([0, 0, 2, 2, 4, 0])
    assert leaks(group, np.array([True, False, False, False, True, False])) == [(1, 0), (5, 0)]
    assert leaks(group, np.zeros(6, bool)) == []


def tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


SIGNS = Path(upstep_fast.__file__).parent / "assets" / "sign_digits_64.tar"
SAMPLE = range(0, 2000, 100)
CHANGES = {
    "smaller": lambda p: p.resize((70, 70)),
    "other aspect": lambda p: p.resize((120, 80)),
    "mirrored": ImageOps.mirror,
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "cut left and top": lambda p: p.crop((5, 5, 100, 100)),
    "cut right": lambda p: p.crop((0, 2, 95, 97)),
    "cut around": lambda p: p.crop((2, 3, 97, 98)),
}


@pytest.mark.parametrize(("change", "least"), [(name, 0.75 if "cut" in name else 0.95) for name in CHANGES])
def test_hashes_tell_copies_from_other_pictures(change, least):
    source = open_source(SIGNS)
    pictures = [Image.fromarray(read_image(source, i).permute(1, 2, 0).numpy()).resize((100, 100)) for i in SAMPLE]
    a = np.stack([copy_hashes(tensor(p)) for p in pictures])
    b = np.stack([copy_hashes(tensor(CHANGES[change](p))) for p in pictures])
    assert are_copies(a, b).mean() >= least and are_copies(b, a).mean() >= least
    first, second = np.array(list(itertools.permutations(range(len(SAMPLE)), 2))).T
    assert not are_copies(a[first], b[second]).any()


@pytest.mark.parametrize("shape", [(3, 50, 50), (1, 50, 50), (5, 50, 50), (3, 1, 1), (3, 2, 300), (1, 300, 300)])
def test_images_of_every_shape_have_hashes_the_first_is_the_perceptual_hash(shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    hashes = copy_hashes(image)
    assert hashes.shape == (COUNT,) and hashes.dtype == np.uint64
    if shape[0] == 1:
        assert int(hashes[0]) == perceptual_hash(image)
    assert are_copies(hashes[None], hashes[None]).all()
