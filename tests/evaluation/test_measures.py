"""Retrieval, few-shot and clusters against scikit-learn, torchmetrics, pytorch-metric-learning and simulation."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from scipy.stats import t
from sklearn import cluster, metrics
from sklearn.neighbors import NearestCentroid
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from upstep_fast.cli.commands import main
from upstep_fast.config.evaluate import MEASURES, checked_measures
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation.features import Extracted, Features
from upstep_fast.evaluation.intervals import SEEDS, T, gain_interval, percent, score_interval
from upstep_fast.evaluation.measures import retrieval as module
from upstep_fast.evaluation.measures.clusters import agreement, kmeans, lloyd, over_seeds
from upstep_fast.evaluation.measures.few_shot import draw, few_shot_right
from upstep_fast.evaluation.measures.measure import measure, measure_notes
from upstep_fast.evaluation.measures.retrieval import retrieval

CLASSES = ("a", "b", "c", "d")


def features(seed, sizes, grid=None, noise=1.0, width=8):
    """Unit features of imbalanced classes; grid: coarse coordinates, so that many similarities are equal."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = y[torch.randperm(len(y), generator=generator)]
    centers = torch.randn(len(sizes), width, generator=torch.Generator().manual_seed(99))
    x = centers[y] + noise * torch.randn(len(y), width, generator=generator)
    if grid is not None:  # signs: every product is a multiple of 2 / grid, but for rounding
        x = x[:, :grid].sign()
        return Features(x / grid**0.5, y, CLASSES[: len(sizes)])
    return Features(F.normalize(x, dim=1), y, CLASSES[: len(sizes)])


def relevance(gallery, test, i):
    return (test.x[i] @ gallery.x.T).numpy(), (gallery.y == test.y[i]).numpy()


def test_retrieval_without_ties_is_that_of_three_other_libraries():
    gallery, test = features(0, (30, 12, 5, 1)), features(1, (9, 7, 4, 2))
    found = retrieval(gallery, test)
    pairs = [relevance(gallery, test, i) for i in range(len(test.y))]
    ap = [metrics.average_precision_score(relevant, score) for score, relevant in pairs]
    assert found.values["map"].numpy() == pytest.approx(ap, abs=1e-12)

    # torchmetrics 1.9 takes a relevant image of a score <= 0 as irrelevant: it needs positive scores
    score = torch.cat([torch.from_numpy(s) for s, _ in pairs]) + 2
    relevant = torch.cat([torch.from_numpy(r) for _, r in pairs])
    index = torch.arange(len(pairs)).repeat_interleave(len(gallery.y))
    assert RetrievalMAP()(score, relevant, indexes=index).item() == pytest.approx(found.values["map"].mean().item())
    for k in module.RECALL_AT:
        expected = RetrievalHitRate(top_k=k)(score, relevant, indexes=index).item()
        assert found.values[f"recall_at_{k}"].mean().item() == pytest.approx(expected)
    assert abs(RetrievalMAP()(score - 2, relevant, indexes=index).item() - found.values["map"].mean().item()) > 0.005
    assert RetrievalMAP()(score - 4, relevant, indexes=index).item() == 0

    calculator = AccuracyCalculator(
        include=("mean_average_precision_at_r", "mean_average_precision", "precision_at_1"),
        k=len(gallery.y),
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(test.x, test.y, gallery.x, gallery.y)
    assert found.values["map_at_r"].mean().item() == pytest.approx(theirs["mean_average_precision_at_r"])
    assert found.values["map"].mean().item() == pytest.approx(theirs["mean_average_precision"])
    assert found.values["recall_at_1"].mean().item() == pytest.approx(theirs["precision_at_1"])


def over_orders(score, relevant):
    """Return AP, AP@R and hits at 1, 5, 10, each averaged over every order of equal scores, by brute force."""
    groups = [np.flatnonzero(score == value) for value in sorted(set(score), reverse=True)]
    rows = []
    for orders in itertools.product(*(itertools.permutations(group) for group in groups)):
        rel = relevant[np.concatenate(orders)]
        r, rank = rel.sum(), np.arange(1, len(rel) + 1)
        precision = rel * rel.cumsum() / rank
        assert precision.sum() / r == pytest.approx(metrics.average_precision_score(rel, -rank))
        rows.append([*(rel[:k].any() for k in module.RECALL_AT), precision.sum() / r, precision[:r].sum() / r])
    return np.mean(rows, 0)


@pytest.mark.parametrize("seed", range(3))
def test_equal_similarities_count_as_the_mean_over_their_orders(seed):
    # 6 images of 4 coordinates +-1/2: similarities are -1, -1/2, 0, 1/2, 1
    gallery, test = features(seed, (3, 2, 1), grid=4), features(seed + 10, (2, 2, 1), grid=4)
    found = torch.stack(list(retrieval(gallery, test).values.values()), 1).numpy()
    pairs = [relevance(gallery, test, i) for i in range(len(test.y))]
    assert min(len(set(score.tolist())) for score, _ in pairs) < 5
    assert found == pytest.approx(np.stack([over_orders(*pair) for pair in pairs]), abs=1e-12)


def test_features_that_are_all_equal_retrieve_at_random():
    """Hits within k of a random order: 1 - C(G - R, k) / C(G, k); a rule by index would give 0 or 1."""
    y = torch.arange(20) % 4
    one = Features(torch.ones(20, 1), y, CLASSES)
    found = retrieval(one, one).values
    for k in module.RECALL_AT:
        miss = np.prod([(15 - m) / (20 - m) for m in range(k)])
        assert found[f"recall_at_{k}"].numpy() == pytest.approx(np.full(20, 1 - miss))


def test_blocks_and_queries_without_a_relevant_image(monkeypatch):
    gallery, test = features(0, (30, 12, 5, 0), grid=8), features(1, (9, 7, 4, 2), grid=8)
    whole = retrieval(gallery, test)
    assert len(whole.queries) == 20 and not (test.y[whole.queries] == 3).any()
    monkeypatch.setattr(module, "BLOCK", 3 * len(gallery.y))
    for name, values in retrieval(gallery, test).values.items():
        assert torch.equal(values, whole.values[name])


def test_two_ranks_rank_as_one(monkeypatch):
    gallery, test = features(0, (30, 12, 5, 1)), features(1, (9, 7, 4, 2))
    monkeypatch.setattr(module, "BLOCK", 4 * len(gallery.y))
    alone, sent = retrieval(gallery, test).values, []
    monkeypatch.setattr(module.distributed, "size", lambda: 2)
    monkeypatch.setattr(module.distributed, "gather_parts", lambda x: [x, *sent] if sent else sent.append(x) or [x[:0]])
    for rank in (1, 0):
        monkeypatch.setattr(module.distributed, "rank", lambda rank=rank: rank)
        found = retrieval(gallery, test).values
    assert 0 < len(sent[0]) < len(test.y) and all(torch.equal(found[name], alone[name]) for name in alone)


@pytest.mark.filterwarnings("ignore:invalid value")  # scikit-learn's deviations of classes of one image
def test_few_shot_is_scikit_learns_nearest_centroid():
    train, test = features(0, (30, 12, 5, 1)), features(1, (9, 7, 4, 2))
    for shots in (1, 5, 10):
        right = few_shot_right(train, test, shots)
        assert right.shape == (SEEDS, len(test.y))
        for seed in range(SEEDS):
            chosen = draw(train.y, shots, seed)
            counts = torch.bincount(train.y[chosen], minlength=4)
            assert counts.tolist() == [min(shots, n) for n in (30, 12, 5, 1)] and len(chosen.unique()) == len(chosen)
            theirs = NearestCentroid().fit(train.x[chosen], train.y[chosen]).predict(test.x)
            assert right[seed].tolist() == (theirs == test.y.numpy()).tolist()
    assert not torch.equal(draw(train.y, 1, 0), draw(train.y, 1, 1))
    absent = Features(train.x[train.y != 2], train.y[train.y != 2], CLASSES)
    assert not few_shot_right(absent, test, 5)[:, test.y == 2].any()


def test_kmeans_is_scikit_learns():
    x = features(0, (90, 60, 30, 3), noise=0.7).x
    start = x[:4].clone()
    theirs = cluster.KMeans(4, init=start.numpy(), n_init=1, tol=1e-4, algorithm="lloyd").fit(x.numpy())
    ours = lloyd(x, start)
    assert metrics.adjusted_rand_score(ours.of, theirs.labels_) == 1
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)
    best = cluster.KMeans(4, n_init=20, random_state=0).fit(x.numpy())
    assert min(kmeans(x, 4, seed).inertia for seed in range(SEEDS)) <= 1.01 * best.inertia_
    assert torch.equal(kmeans(x, 4, seed=3).of, kmeans(x, 4, seed=3).of)
    assert kmeans(torch.ones(5, 2), 3).inertia == 0 and len(kmeans(x[:6], 6).of.unique()) == 6


def value(score):
    return float(score[0] if isinstance(score, tuple) else score.double().mean())


@pytest.mark.parametrize("seed", range(4))
def test_agreement_is_scikit_learns_and_its_jackknife_leaves_one_image_out(seed):
    rng = np.random.default_rng(seed)
    y = torch.from_numpy(np.concatenate([rng.integers(0, 4, 39), [4]]))  # a class of one image
    clusters = torch.from_numpy(np.where(rng.random(40) < 0.6, y, rng.integers(0, 5, 40)))

    def theirs(y, clusters):
        table = metrics.cluster.contingency_matrix(y, clusters)
        return {
            "purity": table.max(0).sum() / len(y),
            "nmi": metrics.normalized_mutual_info_score(y, clusters),
            "ari": metrics.adjusted_rand_score(y, clusters),
        }

    ours = agreement(clusters, y)
    assert {name: value(x) for name, x in ours.items()} == pytest.approx(theirs(y, clusters))
    for i in range(len(y)):
        rest = torch.arange(len(y)) != i
        expected = theirs(y[rest], clusters[rest])
        for name in ("nmi", "ari"):
            assert float(ours[name][1][i]) == pytest.approx(expected[name])


def test_agreement_where_it_is_perfect_or_there_is_nothing_to_agree_on():
    y = torch.tensor([0, 0, 1, 1, 2])
    assert {name: value(x) for name, x in agreement((y + 1) % 3, y).items()} == pytest.approx(
        dict(purity=1, nmi=1, ari=1)
    )
    one = agreement(torch.zeros(5, dtype=torch.int64), y)
    assert {name: value(x) for name, x in one.items()} == pytest.approx(dict(purity=0.4, nmi=0, ari=0), abs=1e-12)


def check_intervals(intervals, estimates, truth):
    """Check that 95 % intervals hold the truth often enough, and are not much wider than the estimates' spread."""
    covered = np.mean([low <= truth <= high for low, high in intervals])
    half = np.mean([(high - low) / 2 for low, high in intervals])
    assert covered > 0.91, covered
    assert 0.85 < half / (1.96 * np.std(estimates)) < 1.6


def test_intervals_of_average_precision_hold_the_truth():
    """Queries of a known distribution against one gallery; truth: the mean over 20,000 of them."""
    gallery, test = features(0, (40, 30, 20, 10), noise=1.5), features(1, (5000,) * 4, noise=1.5)
    noise = [0.25 * torch.randn(part.x.shape, generator=_generator(5)) for part in (gallery, test)]
    noisy = [
        Features(F.normalize(part.x + by, dim=1), part.y, CLASSES)
        for part, by in zip((gallery, test), noise, strict=True)
    ]
    base, adapted = retrieval(*noisy).values["map"], retrieval(gallery, test).values["map"]
    for n in (30, 200):
        picks = torch.randint(len(base), (300, n), generator=_generator(n))
        draws = list(zip(base[picks], adapted[picks], strict=True))
        check_intervals([score_interval(a) for _, a in draws], [percent(a) for _, a in draws], percent(adapted))
        gains = [gain_interval(*pair) for pair in draws]
        check_intervals(gains, [percent(a) - percent(b) for b, a in draws], percent(adapted) - percent(base))
    low, high = gains[0]  # paired: narrower than the difference of two independent scores
    assert high - low < 0.8 * np.hypot(*(np.ptp(score_interval(x)) for x in draws[0]))


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_intervals_of_agreement_hold_the_truth():
    """Classes and clusterings drawn from a known joint distribution, one of SEEDS cleaner than the next, as starts are.

    truth: the mean over the draws.
    """
    rng = np.random.default_rng(0)

    def sample():
        y, noise = rng.integers(0, 4, 300), rng.random(300)
        scores = []
        for share in (0.5, 0.6):
            starts = share + rng.uniform(-0.1, 0.1, SEEDS)
            runs = [np.where(noise < own, y, rng.integers(0, 4, 300)) for own in starts]
            of_run = [agreement(torch.from_numpy(of), torch.from_numpy(y)) for of in runs]
            parts = {name: [run[name] for run in of_run] for name in ("purity", "nmi", "ari")}
            nmi, ari = (over_seeds(parts[name]) for name in ("nmi", "ari"))
            scores.append({"purity": torch.stack(parts["purity"]), "nmi": nmi, "ari": ari})
        return scores

    draws = [sample() for _ in range(80)]
    for name in ("purity", "nmi", "ari"):
        before, after = ([pair[i][name] for pair in draws] for i in (0, 1))
        estimates = np.array([[percent(x) for x in scores] for scores in (before, after)])
        check_intervals([score_interval(x) for x in after], estimates[1], estimates[1].mean())
        paired = [gain_interval(*pair) for pair in zip(before, after, strict=True)]
        check_intervals(paired, estimates[1] - estimates[0], (estimates[1] - estimates[0]).mean())


def test_intervals_over_seeds_hold_the_truth():
    """Right with probability p_image,seed = 0.7 + image's + seed's part; truth 0.7; both parts widen the interval."""
    rng, images = np.random.default_rng(0), 60
    assert pytest.approx(t.ppf(0.975, SEEDS - 1)) == T

    def sample():
        p = 0.7 + rng.uniform(-0.25, 0.25, images) + rng.uniform(-0.05, 0.05, (SEEDS, 1))
        return torch.from_numpy(rng.random((SEEDS, images)) < p)

    draws = [sample() for _ in range(400)]
    check_intervals([score_interval(x) for x in draws], [percent(x) for x in draws], 70)
    pairs = [(x, sample()) for x in draws]
    check_intervals([gain_interval(*pair) for pair in pairs], [percent(b) - percent(a) for a, b in pairs], 0)
    certain = torch.ones(SEEDS, images, dtype=torch.bool)
    assert score_interval(certain)[1] == 100 and gain_interval(certain, certain)[0] < 0


def test_the_measures_of_a_model_and_its_classes(tmp_path):
    train, test = features(0, (30, 12, 5, 1)), features(1, (9, 7, 4, 0))

    def extracted(part, seed):
        noise = torch.randn(part.x.shape, generator=_generator(seed))
        parts = {"base": F.normalize(part.x + noise, dim=1), "adapted": part.x}
        return Extracted({name: x[:, None] for name, x in parts.items()}, part.y, CLASSES)

    train, test = extracted(train, 3), extracted(test, 4)
    measured = measure(train, test, {"": lambda x: {k: v[:, 0] for k, v in x.items()}}, MEASURES, 5, None)
    names = {"knn", "linear", "map", "map_at_r", "purity", "nmi", "ari"}
    names |= {f"recall_at_{k}" for k in (1, 5, 10)} | {f"few_shot_{n}" for n in (1, 5, 10)}
    assert set(measured.values["base"]) == set(measured.values["adapted"]) == names
    rows = measured.per_class
    assert {row["class"]: (row["n_train"], row["n_test"]) for row in rows} == {"a": (30, 9), "b": (12, 7), "c": (5, 4)}
    assert [row["adapted"]["knn"] for row in rows] == sorted(row["adapted"]["knn"] for row in rows)
    for row in rows:
        of_class = test.y == CLASSES.index(row["class"])
        for name in ("knn", "recall_at_1"):
            before, after = (measured.values[model][name][of_class] for model in ("base", "adapted"))
            assert row["adapted"][name] == pytest.approx(100 * after.double().mean().item())
            assert row["gains"]["adapted"][name]["interval"] == gain_interval(before, after)
    assert list(measure_notes(MEASURES, train, test)) == [
        "per-class: no test images of d",
        "few-shot: fewer than 5 training images, all are used: d",
        "few-shot: fewer than 10 training images, all are used: c, d",
    ]


def test_names_of_measures():
    assert checked_measures(("all",)) == MEASURES and checked_measures(("linear,knn",)) == ("knn", "linear")
    assert checked_measures(("per-class",)) == ("knn", "per-class")
    for given in ("recall", ","):
        with pytest.raises(ConfigError, match=f"measures: .*{given.strip(',')}.*choose from knn, linear, retrieval"):
            checked_measures((given,))


def test_eval_prints_and_writes_every_measure(model, photos, tmp_path, capsys):
    rows = [f"{path},{'ab'[i % 2]}" for i, path in enumerate(sorted(photos.iterdir()))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    flags = f"--model {model} --data {tmp_path / 'labels.csv'} --device cpu --json {tmp_path / 's.json'}"
    with pytest.raises(SystemExit) as stop:
        main(f"eval {flags} --measures retrieval,clusters,few-shot,per-class".split())
    assert stop.value.code == 0
    out, scores = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    for word in ("recall@10", "mAP@R", "NMI", "10 a class", "classes, the worst first", "base nearest neighbor"):
        assert word in out
    base = scores["base"]
    assert {"knn", "map", "map_whitened", "ari"} < set(base) and "linear" not in base and len(scores["per_class"]) == 2
    assert all(0 <= base[name] <= 100 for name in base if "ari" not in name)
    assert f"{base['map']:.1f} ± " in out
