"""Indexes of features: recall, extension, folders, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from importlib import import_module
from pathlib import Path

import faiss
import numpy as np
import pytest
from filelock import FileLock

from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.table import FeatureTable
from upstep_fast.evaluation.search import approximate, storage
from upstep_fast.evaluation.search.exact import top_k, unit_rows
from upstep_fast.evaluation.search.index import FeatureIndex, build_index

FACTS = {"model": "demo", "fingerprint": "model=1 adapter=2", "form": "adapted, plain"}


def table(count: int = 3000, width: int = 32, *, seed: int = 0, start: int = 0, facts: dict = FACTS) -> FeatureTable:
    """Features in 60 clusters, which are those of every seed."""
    centers = np.random.default_rng(99).standard_normal((60, width))
    random = np.random.default_rng(seed)
    x = centers[random.integers(0, 60, count)] + 0.5 * random.standard_normal((count, width))
    return FeatureTable(tuple(f"{start + i}.jpg" for i in range(count)), x.astype(np.float32), facts)


@pytest.fixture
def small(monkeypatch):
    """Indexes are approximate from 1,000 images on."""
    monkeypatch.setattr(approximate, "EXACT_BELOW", 1000)


def test_exact_below_the_limit_and_on_request(small):
    assert build_index(table(999)).lists is None
    assert build_index(table(1000)).lists is not None
    assert build_index(table(1000), exact=True).lists is None


def test_exact_without_faiss(small, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(approximate, "is_installed", lambda: False)
    index = build_index(table(1500))
    assert index.lists is None and index.recall == 1.0
    assert [record.message for record in caplog.records] == [
        'search: exact; `pip install "upstep_fast[search]"` adds an index that reads a part of the images'
    ]


def test_recall_is_what_another_sample_shows(small):
    index = build_index(table())
    assert index.recall >= approximate.RECALL
    rows = np.arange(1, 3000, 7)
    found, true = index.search(index.x[rows], 21)[1], top_k(index.x, index.x[rows], 21)[1]
    hits = [len((set(a) & set(b)) - {row}) / 20 for a, b, row in zip(found, true, rows, strict=True)]
    assert abs(np.mean(hits) - index.recall) < 0.03


def test_exact_where_lists_do_not_help(small, tmp_path):
    """Vectors without clusters: neighbors lie in any list."""
    x = np.random.default_rng(0).standard_normal((1500, 64)).astype(np.float32)
    index = build_index(FeatureTable(tuple(map(str, range(1500))), x, {}))
    assert index.is_exact and index.recall == 1.0 and "exact" in repr(index)
    assert np.array_equal(index.search(x[:50], 20)[1], top_k(index.x, index.x[:50], 20)[1])
    assert FeatureIndex.open(index.save(tmp_path / "i")).is_exact


def test_recall_of_a_planted_index(small):
    """Two far groups, each in its own list, but half of one group filed in the other's list: recall is known."""
    random = np.random.default_rng(0)
    x = unit_rows(np.repeat(np.eye(4)[:2] * 9, 40, axis=0) + random.standard_normal((80, 4)))
    list_of = np.repeat([0, 1], 40)
    list_of[:40:2] = 1  # of the first group, even rows are not looked at
    lists = approximate.InvertedLists(np.eye(4, dtype=np.float32)[:2].copy(), list_of, "", 80)
    index = approximate.faiss_index(lists, x)
    truth, rows = top_k(x, x[1:2], 21), np.array([[1]])
    answer = approximate.search(index, 1, x, x[1:2], 15)
    assert set(answer[1][0]) <= set(range(1, 40, 2))
    expected = len(set(truth[1][0]) & set(answer[1][0]) - {1}) / 20
    assert approximate.recall(truth, answer, rows) == pytest.approx(expected)
    assert 0.2 < expected < 0.8
    # 20 rows in the list, 21 asked for: FAISS pads with -1, so the query is searched exactly
    assert np.array_equal(approximate.search(index, 1, x, x[1:2], 21)[1], truth[1])


def test_scores_are_those_of_the_exact_search(small):
    index = build_index(table())
    queries = table(50, seed=5).x
    scores, rows = index.search(queries, 10)
    unit = unit_rows(queries).astype(np.float64)
    assert np.array_equal(scores, (index.x.astype(np.float64)[rows] * unit[:, None]).sum(-1))
    assert (np.diff(scores, axis=1) <= 0).all()


def test_nprobe_holds_in_searches_with_parameters():
    """FAISS's own trap: parameters that do not name nprobe mean 1, whatever the index says."""
    x = unit_rows(table().x)
    lists = approximate.build([str(i) for i in range(len(x))], x)
    index = approximate.faiss_index(lists, x)
    index.nprobe = len(lists.centroids)
    true = top_k(x, x[:200], 20)[1]
    search = getattr(index, "search_numpy", index.search)
    trap = search(x[:200], 20, params=faiss.SearchParametersIVF())[1]
    ours = approximate.search(index, len(lists.centroids), x, x[:200], 20)[1]
    assert (trap == true).mean() < 0.9
    assert np.array_equal(ours, true)


def test_searches_where_faiss_takes_tensors():
    """An import anywhere in the process replaces the methods of all indexes."""
    x = unit_rows(table().x)
    lists = approximate.build([str(i) for i in range(len(x))], x)
    index = approximate.faiss_index(lists, x)
    import_module("faiss.contrib.torch_utils")
    with pytest.raises(TypeError, match="params"):
        index.search(x[:2], 2, params=faiss.SearchParametersIVF())
    scores, rows = approximate.search(index, len(lists.centroids), x, x[:200], 20)
    true_scores, true_rows = top_k(x, x[:200], 20)
    assert np.array_equal(rows, true_rows) and np.array_equal(scores, true_scores)


@pytest.mark.parametrize("limit", [1000, 100_000])
def test_extended_equals_rebuilt(monkeypatch, tmp_path, limit):
    monkeypatch.setattr(approximate, "EXACT_BELOW", limit)
    first, more = table(2000), table(500, seed=1, start=2000)
    both = FeatureTable(first.names + more.names, np.concatenate([first.x, more.x]), FACTS)
    index = build_index(first)
    index.save(tmp_path / "i")
    grown = FeatureIndex.open(tmp_path / "i").add(more)
    grown.save(tmp_path / "i")
    read, rebuilt = FeatureIndex.open(tmp_path / "i"), build_index(both)
    assert read.names == rebuilt.names and np.array_equal(read.x, rebuilt.x) and read.facts == FACTS
    queries = table(20, seed=2).x
    if limit > 2500:
        for ours, expected in zip(read.search(queries, 9), rebuilt.search(queries, 9), strict=True):
            assert np.array_equal(ours, expected)
    else:
        assert np.array_equal(read.lists.centroids, index.lists.centroids)  # not trained again
        assert read.recall >= approximate.RECALL and read.lists.trained == 2000
        assert np.array_equal(read.search(queries, 9)[1], grown.search(queries, 9)[1])
    assert len(list((tmp_path / "i").glob("part-*.npy"))) == 2
    assert len(list((tmp_path / "i").glob("lists-*"))) == (limit < 2500)


def test_trained_again_when_twice_as_large(small):
    index = build_index(table(1200)).add(table(1500, seed=1, start=1200))
    assert index.lists.trained == 2700


def test_an_index_that_grows_beyond_the_limit_gets_lists(small):
    assert build_index(table(900)).add(table(200, seed=1, start=900)).lists is not None
    assert build_index(table(900), exact=True).add(table(200, seed=1, start=900)).lists is None


def test_odd_names(tmp_path):
    names = ("a b.jpg", "c\nd.jpg", '"e".jpg', "f\udcff.jpg", "\u202eg.jpg", "")
    build_index(FeatureTable(names, table(6).x, {})).save(tmp_path / "i")
    assert FeatureIndex.open(tmp_path / "i").names == names


def test_empty(tmp_path):
    empty = FeatureTable((), np.empty((0, 8), np.float32), FACTS)
    build_index(empty).save(tmp_path / "i")
    index = FeatureIndex.open(tmp_path / "i")
    assert index.search(np.ones((2, 8)), 5)[1].shape == (2, 0)
    index.add(table(3, 8)).save(tmp_path / "i")
    assert len(FeatureIndex.open(tmp_path / "i")) == 3


def test_refused_queries_and_features():
    index = build_index(table(50))
    for queries, reason in (
        (np.ones((1, 31)), "width 31"),
        (np.full((1, 32), np.nan), "row 0 is not finite"),
        (np.zeros((2, 32)), "row 0 is not finite or is 0"),
        (np.ones(32), "must be floating-point"),
    ):
        with pytest.raises(DataError, match=reason):
            index.search(queries, 5)
    with pytest.raises(ConfigError, match="k: got 0"):
        index.search(np.ones((1, 32)), 0)
    with pytest.raises(ConfigError, match="no model"):
        index.search_images("a.jpg")
    for change in ({"fingerprint": "model=1 adapter=3"}, {"form": "base, plain"}):
        with pytest.raises(DataError, match="embed all images by one model"):
            index.add(table(5, start=50, facts=FACTS | change))
    with pytest.raises(DataError, match=r"0\.jpg is in it already"):
        index.add(table(5))
    with pytest.raises(DataError, match="width 16"):
        index.add(table(5, 16, start=50))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "gone", "pipe", "foreign"])
@pytest.mark.parametrize("file", ["index.json", "part-*.npy", "part-*.txt", "lists-*"])
def test_damaged_files_are_one_line(small, tmp_path, file, kind):
    folder = tmp_path / "i"
    build_index(table(1200)).save(folder)
    (path,) = folder.glob(file)
    data = path.read_bytes()
    if kind == "flip":
        damage(path)
    else:
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind in ("cut", "empty", "foreign"):
        path.write_bytes({"cut": data[:-9], "empty": b"", "foreign": b"\x80\x04IxFI" * 50}[kind])
    with pytest.raises((DataError, ConfigError)) as caught:
        FeatureIndex.open(folder)
    text = str(caught.value)
    assert text.startswith("index: ") and "\n" not in text and len(text) < 500 and str(folder) in text


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"parts": []},
        {"parts": [{"file": "../x.npy", "rows": 1, "bytes": 1, "digest": ""}]},
        {"parts": [{"file": "part-1.npy", "rows": -1, "bytes": 1, "digest": ""}]},
        {"parts": [3]},
        {"facts": []},
        {"lists": "/etc/passwd"},
        {"lists": 3},
    ],
)
def test_forged_manifests(tmp_path, change):
    folder = build_index(table(20)).save(tmp_path / "i")
    manifest = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=r"make (it|the index) again"):
        FeatureIndex.open(folder)


def test_folders_that_are_refused(tmp_path):
    index = build_index(table(20))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").touch()
    with pytest.raises(ConfigError, match=r"holds other files, such as a\.txt"):
        index.save(tmp_path / "other")
    with pytest.raises(ConfigError, match="holds no index"):
        FeatureIndex.open(tmp_path / "none")
    index.save(tmp_path / "i")
    index.save(tmp_path / "i")  # again: nothing is new
    for other in (table(20, seed=1), table(10)):
        with pytest.raises(DataError, match="index of other images"):
            build_index(other).save(tmp_path / "i")
    with pytest.raises(DataError, match="have the adapter 2, these 3"):
        build_index(table(20, facts=FACTS | {"fingerprint": "model=1 adapter=3"})).save(tmp_path / "i")
    assert len(FeatureIndex.open(tmp_path / "i")) == 20


def test_two_writers(tmp_path):
    folder = build_index(table(20)).save(tmp_path / "i")
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    with FileLock(folder / storage.LOCK), pytest.raises(ConfigError, match="being written by another process"):
        build_index(table(30)).save(folder)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def save_and_die(index: FeatureIndex, folder: Path, count: int) -> int:
    """Save in a fork that is killed before replacement number `count`; return the signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        replace, left = os.replace, iter(range(count))

        def counted(*paths: Path) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = counted
        index.save(folder)
    finally:
        os._exit(0)


def test_killed_while_writing(small, tmp_path):
    """A kill before each replacement: the old index is there, and the next save completes the new one."""
    folder = build_index(table(1200)).save(tmp_path / "i")
    grown = build_index(table(1200)).add(table(300, seed=1, start=1200))
    for count in range(4):
        assert save_and_die(grown, folder, count) == -signal.SIGKILL
        assert len(FeatureIndex.open(folder)) == 1200
    assert save_and_die(grown, folder, 9) == 0
    read = FeatureIndex.open(folder)
    assert read.names == grown.names and np.array_equal(read.x, grown.x) and read.recall == grown.recall
    kinds = sorted(path.name.split("-")[0] for path in folder.iterdir())
    assert kinds == ["index.json", "index.lock", "lists", *["part"] * 4]


def test_two_builds_are_equal(small):
    first, second = build_index(table()), build_index(table())
    assert np.array_equal(first.lists.centroids, second.lists.centroids)
    assert np.array_equal(first.lists.list_of, second.lists.list_of) and first.recall == second.recall
