"""Columns, maps, thumbnails and the command of the explorer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from photos import save_photos

from upstep_fast.cli.commands import main
from upstep_fast.config.explore import ExploreConfig
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.explorer import gallery, maps, serve
from upstep_fast.explorer.columns import MAX_CATEGORIES, NONE, of_categories, of_folders, of_texts, read_columns
from upstep_fast.explorer.maps import in_square, principal, spread, turned_to
from upstep_fast.explorer.open import require_packages
from upstep_fast.explorer.thumbnails import Thumbnails, encoded

# ---- columns


def test_few_categories_are_in_the_order_of_their_names_and_many_by_their_number():
    assert of_categories("c", ["b10", "b9", NONE, "a"]).categories == ("a", "b9", "b10", NONE)
    many = [f"{i}" for i in range(20)] + ["7", "7", "3"]
    column = of_categories("c", many)
    assert column.categories[:3] == ("7", "3", "0")
    assert [column.categories[code] for code in column.values] == many


def test_categories_beyond_the_limit_share_one():
    texts = [f"{i:05}" for i in range(MAX_CATEGORIES + 5)] + ["00003"]
    column = of_categories("c", texts)
    assert len(column.categories) == MAX_CATEGORIES and column.categories[-1] == "(others)"
    assert column.text(3) == "00003" and column.text(MAX_CATEGORIES + 4) == "(others)"


@pytest.mark.parametrize(
    ("texts", "is_number"),
    [
        (["0.5", "1.5", ""], True),
        ([str(i) for i in range(13)], True),
        ([str(i % 12) for i in range(40)], False),
        (["1", "2", "x"], False),
        (["nan", "1.5"], False),
        (["inf", "1.5"], False),
        (["1e300", "1.5"], False),
        (["", ""], False),
    ],
)
def test_a_column_of_numbers(texts, is_number):
    column = of_texts("c", texts)
    assert column.is_number == is_number
    if is_number:
        expected = np.array([float(t) if t else np.nan for t in texts], np.float32)
        np.testing.assert_array_equal(column.values, expected)
        assert column.text(len(texts) - 1) == texts[-1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/d/a/1.png", "/d/b/2.png"], ["a", "b"]),
        (["/d/ab/1.png", "/d/ac/x/2.png"], ["ab", "ac/x"]),
        (["d/1.png", "d/b/2.png"], [".", "b"]),
        (["a/1.png", "b/2.png"], ["a", "b"]),
        (["a/1.png", "a/2.png"], None),
        (["1.png", "a/2.png"], [".", "a"]),
    ],
)
def test_folders_below_what_all_share(names, expected):
    column = of_folders(names)
    assert expected == (None if column is None else [column.text(i) for i in range(len(names))])


def test_a_table_is_matched_by_whole_names_and_by_ends_that_are_unique(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("path,v\n/d/a/1.png,whole\n2.png,end\n3.png,twice\nb/4.png,folder\n")
    names = ["/d/a/1.png", "/d/a/2.png", "/d/a/3.png", "/d/b/3.png", "/d/b/4.png", "/d/a/4.png"]
    (column,) = read_columns(table, names)
    assert [column.text(i) for i in range(6)] == ["whole", "end", NONE, NONE, "folder", NONE]
    table.write_text("path,v\n/other/9.png,1\n")
    with pytest.raises(DataError, match="none of the 1 paths"):
        read_columns(table, names)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_columns(tmp_path, names)


# ---- maps


def test_principal_components_are_those_of_a_singular_value_decomposition():
    x = np.random.default_rng(0).normal(size=(200, 7)).astype(np.float32) * np.arange(1, 8)
    u, s, _ = np.linalg.svd(x.astype(np.float64) - x.mean(0), full_matrices=False)
    y = principal(x.astype(np.float32), 3)
    np.testing.assert_allclose(np.abs(y), np.abs((u * s)[:, :3]), rtol=2e-4, atol=2e-3)
    assert principal(x[:, :1].astype(np.float32), 2).shape == (200, 2)


def test_a_turned_map_is_turned_back():
    to = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    turn = np.array([[0, 1], [1, 0]]) @ np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    np.testing.assert_allclose(turned_to((to @ turn).astype(np.float32), to), to, atol=1e-5)


def test_a_map_lies_in_the_square_but_for_its_outermost_points():
    y = np.random.default_rng(0).normal(size=(5000, 2)) * (3, 1) + 7
    y[0] = 1000
    square = in_square(y)
    assert square.dtype == np.float32 and (np.abs(square) <= 1).all(1).mean() > 0.995
    assert np.isfinite(in_square(np.ones((20, 2)))).all()  # all images alike
    assert spread(10, 3).tolist() == [0, 3, 6] and len(spread(0, 3)) == 0


def clusters(count=60, width=16):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, width)) * 4
    y = np.arange(count) % 3
    x = centers[y] + rng.normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), y


@pytest.mark.long  # UMAP compiles for up to a minute
def test_umap_comes_from_its_process_keeps_clusters_together_and_is_cached(tmp_path):
    from sklearn.manifold import trustworthiness

    x, _ = clusters()
    both = {"base": x, "adapted": x[:, ::-1].copy()}
    made = maps.start_maps(both, tmp_path)
    while made.state:
        assert made.state == "UMAP is being computed"
        time.sleep(0.1)
    for column, rows in both.items():
        assert trustworthiness(rows, made.ready["umap", column], n_neighbors=5) > 0.8
    again = maps.start_maps(both, tmp_path)
    assert not again.state and (again.ready["umap", "base"] == made.ready["umap", "base"]).all()


def test_a_process_that_fails_or_is_stopped_is_said(monkeypatch, tmp_path, caplog):
    x, _ = clusters()
    monkeypatch.setattr(maps.sys, "executable", "/bin/false")
    made = maps.start_maps({"base": x}, None)
    while made.state == "UMAP is being computed":
        time.sleep(0.01)
    assert made.state.startswith("UMAP failed") and ("pca", "base") in made.ready
    assert maps.start_maps({"base": x[:5]}, None).state == "UMAP needs 10 images"
    monkeypatch.undo()
    stopped = maps.start_maps({"base": x}, None)
    while stopped.process is None:
        time.sleep(0.01)
    stopped.close()
    assert stopped.process.wait(10) != 0
    next((t.join(10) for t in threading.enumerate() if t.name == "explore: UMAP"), None)
    assert stopped.state == "stopped" and "ended with -" not in caplog.text  # closing is no failure


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", "shape", "nan", "pickle"])
def test_a_damaged_cache_is_computed_again(tmp_path, damage, monkeypatch):
    x, _ = clusters()
    monkeypatch.setattr(maps, "_compute", lambda *_: None)
    folder = tmp_path / maps.key_of({"base": x})
    folder.mkdir()
    file = folder / "umap-base.npy"
    good = np.zeros((60, 2), np.float32)
    np.save(file, good)
    assert not maps.start_maps({"base": x}, tmp_path).state
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        np.save(file, {"shape": good[1:], "nan": good * np.nan, "pickle": np.array([{}], object)}[damage])
    assert maps.start_maps({"base": x}, tmp_path).state


# ---- thumbnails


def test_the_cache_of_thumbnails_is_bounded_and_used(tmp_path):
    source = open_source(save_photos(tmp_path, 12))
    cache = tmp_path / "cache"
    first = Thumbnails(source, 3, cache, limit=4000)
    made = [first.small(i) for i in range(12)]
    files = list(cache.iterdir())
    assert 0 < sum(file.stat().st_size for file in files) <= 4000 and len(files) < 12
    (cache / "11.webp").write_bytes(b"from the cache")
    again = Thumbnails(source, 3, cache, limit=4000)
    assert again.small(11) == b"from the cache" and again.small(0) == made[0]
    (cache / "11.webp").unlink()
    assert again.small(11) == made[11]


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_an_image_of_any_channels_has_a_picture(channels):
    assert encoded(torch.zeros(channels, 300, 200, dtype=torch.uint8), 160)[8:12] == b"WEBP"


# ---- the command


class Stub:
    """A gallery for the server alone."""

    title, names, x, columns, has_files = "run", ("a",), {"base": np.ones((1, 2))}, [], True

    def __len__(self):
        return 1

    def close(self):
        self.is_closed = True


def test_the_command_prints_an_address_that_answers_and_ends_with_0(monkeypatch, capsys):
    stub, answers = Stub(), []

    class Wait(threading.Event):
        def wait(self, timeout=None):
            line = capsys.readouterr().out
            answers.append(json.load(urllib.request.urlopen(line.split()[1] + "api/facts")))
            raise KeyboardInterrupt

    monkeypatch.setattr(serve, "gallery_of_run", lambda config: stub)
    monkeypatch.setattr(serve, "forever", Wait())
    with pytest.raises(SystemExit) as stop:
        main(["explore", "run", "--no-browser"])
    assert stop.value.code == 0 and answers[0]["count"] == 1 and stub.is_closed


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--host", "0.0.0.0"], "host"),
        (["--port", "70000"], "port"),
        (["--clusters", "1"], "clusters"),
        ([], "does not exist"),
    ],
)
def test_bad_options_are_one_line(flags, field, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["explore", str(tmp_path / "missing"), "--no-browser", *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(error) == 1 and field in error[0]


def test_a_port_that_is_taken_is_one_line():
    listener = serve.listen(0)
    with pytest.raises(ConfigError, match="port: cannot listen"):
        serve.listen(listener.getsockname()[1])
    assert listener.getsockname()[0] == "127.0.0.1"
    listener.close()


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr("upstep_fast.explorer.open.PACKAGES", ("starlette", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package; pip install \"upstep_fast\[explore\]\""):
        require_packages()


def test_the_page_needs_no_package_of_the_extra_to_be_imported():
    code = (
        "import sys, upstep_fast.explorer.open; sys.exit(any(m in sys.modules for m in ('torch', 'starlette', 'umap')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_table_is_told_before_anything_is_embedded(monkeypatch, tmp_path):
    monkeypatch.setattr(gallery, "read_or_embed", None)
    with pytest.raises(ConfigError, match=r"columns: .*missing\.csv is not a regular file"):
        gallery.gallery_of_run(ExploreConfig(str(tmp_path), columns=str(tmp_path / "missing.csv")))
