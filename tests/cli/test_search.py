"""The search command: what it finds, prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.evaluation import run_search
from upstep_fast.evaluation.feature_files.table import read_features
from upstep_fast.evaluation.search import approximate

LINE = re.compile(r" *(\d+)  (-?\d\.\d{4})  (.+)")


@pytest.fixture(scope="module")
def world(tmp_path_factory, short_run, model, photos):
    """A folder with a finished run, its features, and photographs of which two are equal."""
    folder = tmp_path_factory.mktemp("search")
    shutil.copytree(photos, folder / "photos")
    shutil.copy(folder / "photos" / "03.png", folder / "photos" / "copy of 03.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        upstep_fast.adapt(model, "photos", "run", **short_run)
    return folder


@pytest.fixture
def search(world, monkeypatch, capsys):
    """Run the command in the folder; return its exit code, stdout and the last line of stderr."""
    monkeypatch.chdir(world)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["search", *map(str, args), "--device", "cpu"])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, (err.splitlines() or [""])[-1]

    return run


def expected(world, query: str) -> list[tuple[float, str]]:
    """All images by their cosine with a query, in float64, from features that `embed` computes."""
    m = upstep_fast.load(world / "run", device="cpu")
    names = m.paths("photos")
    x, (q,) = m.embed("photos").astype(np.float64), m.embed([query]).astype(np.float64)
    scores = x @ q / np.linalg.norm(x, axis=1) / np.linalg.norm(q)
    return [(scores[i], names[i]) for i in np.argsort(-scores, kind="stable")]


def matches(text: str) -> list[tuple[float, str]]:
    return [(float(m[2]), m[3]) for m in map(LINE.fullmatch, text.splitlines()) if m]


@pytest.mark.parametrize("query", ["photos/05.png", "query.bmp"])
def test_the_nearest_images(world, search, query):
    """A name of the images, and another file, of another format."""
    Image.open(world / "photos" / "07.png").rotate(3).save(world / "query.bmp")
    code, out, err = search("run", query, "--k", 6)
    assert code == 0, err
    true = expected(world, query)[:6]
    found = matches(out)
    assert [name for _, name in found] == [name for _, name in true]
    assert np.allclose([score for score, _ in found], [score for score, _ in true], atol=1e-4)
    assert out.splitlines()[0] == f"similar to {query}"
    assert out.splitlines()[-1] == "searched: 25 images, exact"


def test_formats_agree(world, search):
    _, text, _ = search("run", "photos/05.png", "photos/06.png", "--k", 4, "--json", "r.json", "--out", "r.html",
                        "--overwrite")  # fmt: skip
    _, table, _ = search("run", "photos/05.png", "photos/06.png", "--k", 4, "--csv")
    content = json.loads((world / "r.json").read_text())
    rows = list(csv.DictReader(io.StringIO(table)))
    flat = [(q["query"], m["rank"], m["path"]) for q in content["queries"] for m in q["matches"]]
    assert [(row["query"], int(row["rank"]), row["path"]) for row in rows] == flat
    assert [name for _, name in matches(text)] == [path for _, _, path in flat]
    assert content["exact"] is True and content["recall"] == 1.0 and content["images"] == 25
    assert content["features"]["fingerprint"].startswith("model=")
    page = (world / "r.html").read_text()
    assert page.count("data:image/webp;base64,") == 10 and "<script" not in page
    assert all(name in page for _, _, name in flat)


def test_distinct_leaves_out_copies(search):
    _, out, _ = search("run", "photos/03.png", "--k", 3)
    assert {name for score, name in matches(out) if score == 1} == {"photos/03.png", "photos/copy of 03.png"}
    code, out, _ = search("run", "photos/03.png", "--k", 3, "--distinct")
    found = matches(out)
    assert code == 0 and len(found) == 3 and all(score < 0.9999 for score, _ in found)
    assert len(matches(search("run", "photos/03.png", "--k", 100, "--distinct")[1])) == 23
    assert len(matches(search("run", "photos/03.png", "--k", 100)[1])) == 25


def test_pictures_within_files(world, search):
    shutil.make_archive(str(world / "shard"), "tar", world / "photos")
    code, out, err = search("run", "photos/03.png", "--data", "shard.tar", "--k", 2, "--out", "tar.html", "--overwrite")
    assert code == 0, err
    assert {name for _, name in matches(out)} == {"shard.tar/03.png", "shard.tar/copy of 03.png"}
    assert (world / "tar.html").read_text().count("data:image/webp;base64,") == 3


def test_an_approximate_index_is_kept_and_extended(world, search, monkeypatch):
    monkeypatch.setattr(approximate, "EXACT_BELOW", 10)
    shutil.rmtree(world / "run" / "index", ignore_errors=True)
    file = world / "run" / "index" / run_search.LISTS
    code, out, err = search("run", "photos/05.png", "--k", 3)
    assert code == 0, err
    assert re.search(r"25 images, approximate: \d+\.\d % of the 20 nearest images are found, measured on 25", out)
    first = approximate.read(file)
    build = approximate.build
    monkeypatch.setattr(approximate, "build", lambda *_: pytest.fail("made again"))
    assert search("run", "photos/05.png", "--k", 3)[1] == out
    extra = world / "photos" / "new.png"
    try:
        Image.open(world / "photos" / "08.png").rotate(9).save(extra)
        code, out, err = search("run", "photos/new.png", "--k", 1)
        assert code == 0 and matches(out)[0][1] == "photos/new.png", err
        assert len(approximate.read(file).list_of) == 26
        assert np.array_equal(approximate.read(file).centroids, first.centroids)
    finally:
        extra.unlink()
    monkeypatch.setattr(approximate, "build", build)
    file.write_bytes(file.read_bytes()[:-7])
    code, out, err = search("run", "photos/05.png", "--k", 3)
    assert code == 0 and "cannot use" in err and matches(out)[0][1] == "photos/05.png"
    assert "exact" in search("run", "photos/05.png", "--exact")[1].splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("run", "gone.png"), 3, "query: gone.png is no image file, and no name of the 25 images"),
        (("run", "photos"), 3, "query: photos is no image file"),
        (("run", "run/config.toml"), 3, "query: run/config.toml: "),
        (("run",), 2, "--query must be given"),
        (("run", "photos/03.png", "--k", "0"), 2, "k: got 0"),
        (("run", "photos/03.png", "--out", "x.png"), 2, "out: got x.png, must end in .html"),
        (("run", "photos/03.png", "--out", "none/x.html"), 2, "out: no folder none"),
        (("run", "photos/03.png", "--out", "old.html"), 2, "out: old.html exists"),
        (("nothing", "photos/03.png"), 2, "nothing"),
        (("run", "photos/03.png", "--features", "none.npy"), 3, "features: "),
        (("run", "photos/03.png", "--data", "none"), 3, "none"),
        (("run", "query.png", "--features", "narrow.npy"), 3, "width 12"),
    ],
)
def test_refused_in_one_line(world, search, args, code, reason):
    (world / "old.html").touch()
    np.save(world / "narrow.npy", np.ones((2, 12), np.float32))
    (world / "narrow.txt").write_text("a.png\nb.png\n")
    shutil.copy(world / "photos" / "03.png", world / "query.png")
    got, out, err = search(*args)
    assert (got, out) == (code, "") and err.startswith("upstep-fast: ") and reason in err, err


def test_a_table_and_a_model_make_an_index(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    m = upstep_fast.load(world / "run", device="cpu")
    out = upstep_fast.embed(world / "run", "photos", tmp_path / "f.safetensors", device="cpu")
    index = m.index(read_features(out))
    with Image.open(world / "photos" / "03.png") as image:
        for query in ("photos/03.png", image, np.asarray(image), ["photos/03.png"]):
            (found,) = index.search_images(query, k=2)
            assert [match.name for match in found] == ["photos/03.png", "photos/copy of 03.png"]
            assert found[0].similarity == pytest.approx(1, abs=1e-5)
    index.save(tmp_path / "i")
    again = upstep_fast.FeatureIndex.open(tmp_path / "i", m)
    assert again.search_images("photos/03.png", k=2)[0][0].name == "photos/03.png"
    own = m.index("photos")
    assert own.names == index.names and np.array_equal(own.x, index.x)
    assert len(own.add([world / "photos" / "03.png"])) == 26  # its name is another
    with pytest.raises(upstep_fast.errors.DataError, match="adapter"):
        upstep_fast.FeatureIndex.open(tmp_path / "i", upstep_fast.load(m.backbone.name, device="cpu"))
