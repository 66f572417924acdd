"""The curate command: planted copies, leaks, outliers and wrong classes, its files, the list, and bad input."""

from __future__ import annotations

import csv
import os
import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps

import upstep_fast
from upstep_fast.cli.commands import main
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, DataError

CPU = dict(device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, photos):
    """Two classes of train and test with one plant of each kind."""
    top = tmp_path_factory.mktemp("planted")
    for i, file in enumerate(sorted(photos.iterdir())):
        to = top / ("test" if i % 6 == 5 else "train") / "ab"[i % 2]
        to.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    a, b, test = top / "train" / "a", top / "train" / "b", top / "test" / "b"
    shutil.copy(a / "00.png", a / "same bytes\n.png")
    Image.open(a / "02.png").resize((80, 80)).save(a / "larger.png")
    ImageOps.mirror(Image.open(test / "05.png")).save(b / "mirrored test.png")
    shutil.copy(a / "04.png", b / "in b.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(a / "<b>noise.png")
    return top


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return upstep_fast.curate("demo", planted, out / "curation", apply=out / "keep.txt", **CPU)


def rows(found, kind):
    return [
        (os.path.basename(f.path), os.path.basename(f.other), f.suggested) for f in found.findings if f.finding == kind
    ]


def test_each_plant_is_found(found):
    assert ("same bytes\n.png", "00.png", "drop") in rows(found, "exact")
    assert ("larger.png", "", "keep") in rows(found, "near") and ("02.png", "larger.png", "drop") in rows(found, "near")
    assert rows(found, "leak") == [("mirrored test.png", "05.png", "drop")]
    assert rows(found, "outlier")[0][0] == "<b>noise.png"
    assert {name for name, _, _ in rows(found, "conflict")} == {"04.png", "in b.png"}
    assert found.counts["exact"] == 2 and found.counts["near"] == 1 and found.counts["leak"] == 1


def test_the_list_is_read_as_data_without_what_is_dropped(found, planted):
    keep = open_source(found.out.parent / "keep.txt")
    names = {os.path.basename(keep.name(i)) for i in range(len(keep))}
    whole = open_source(planted)
    every = {os.path.basename(whole.name(i)) for i in range(len(whole))}
    assert every - names == {"same bytes\n.png", "02.png", "mirrored test.png", "in b.png"}
    assert set(keep.labels) == {"a", "b"} and len(open_source(found.out.parent / "keep.txt", "test")) == 4
    assert [keep.name(i) for i in range(len(keep))] == list(found.kept)


def test_the_table_has_a_row_for_each_finding_that_a_spreadsheet_can_read(found):
    with open(found.out / "curation.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["path", "finding", "score", "group", "other", "suggested", "why"]
    assert [row["path"] for row in table] == [f.path for f in found.findings]
    assert all(np.isfinite(float(row["score"])) for row in table)


def test_the_page_shows_pictures_and_escapes_names(found):
    page = (found.out / "curation.html").read_text()
    assert "default-src 'none'" in page and "<b>noise" not in page and "&lt;b&gt;noise" in page
    assert page.count("data:image/webp") >= 10
    for title in ("Exact copies (2)", "Near copies (1)", "Copies of test images (1)", "Unlike all others"):
        assert title in page


def test_against_another_folder_and_what_is_dropped(planted, tmp_path, capsys):
    args = ["curate", "demo", "--data", planted / "train", "--against", planted / "test", "--out", tmp_path / "out"]
    args += ["--apply", tmp_path / "keep.txt", "--drop", "leak", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    out = capsys.readouterr().out
    assert not stop.value.code and "1 leak" in out and "keep.txt" in out
    names = [os.path.basename(n) for n in open_names(tmp_path / "keep.txt")]
    assert "mirrored test.png" not in names and "same bytes\n.png" in names and "05.png" not in names


def open_names(path):
    source = open_source(path)
    return [source.name(i) for i in range(len(source))]


def test_features_that_are_there_are_used_and_a_list_is_curated_again(found, planted, tmp_path, monkeypatch):
    upstep_fast.embed("demo", found.out.parent / "keep.txt", tmp_path / "f.npy", **CPU)
    from upstep_fast.evaluation import run_features

    monkeypatch.setattr(run_features, "model_of", lambda config: pytest.fail("the model was loaded"))
    options = dict(features=tmp_path / "f.npy", apply=tmp_path / "keep.txt", drop=("outlier", "near"), **CPU)
    again = upstep_fast.curate("demo", found.out.parent / "keep.txt", tmp_path / "out", **options)
    assert again.counts["exact"] == again.counts["leak"] == 0
    assert open_names(tmp_path / "keep.txt") == list(again.kept)
    assert not any("noise" in name for name in again.kept)


def test_a_commit_that_was_killed_is_completed(model, photos, tmp_path, monkeypatch):
    data, out, keep = tmp_path / "in", tmp_path / "out", tmp_path / "keep.txt"
    shutil.copytree(photos, data)
    options = dict(apply=keep, overwrite=True, **CPU)
    upstep_fast.curate(model, data, out, **options)
    shutil.copy(data / "00.png", data / "copy.png")

    class Killed(BaseException):
        """In place of SIGKILL."""

    def kill(*_):
        raise Killed

    monkeypatch.setattr("upstep_fast.runtime.commit._complete", kill)
    with pytest.raises(Killed):
        upstep_fast.curate(model, data, out, **options)
    monkeypatch.undo()
    assert "copy.png" not in (out / "curation.csv").read_text()
    with pytest.raises(ConfigError, match=r"out: a write of .*keep.txt, .*curation.csv was killed halfway; repeat"):
        upstep_fast.curate(model, data, out, overwrite=True, **CPU)
    with pytest.raises(ConfigError, match=r"holds an earlier curation.csv"):
        upstep_fast.curate(model, data, out, apply=keep, **CPU)
    assert "copy.png" in (out / "curation.csv").read_text() and len(open_source(keep)) == 24
    assert not [path for folder in (out, tmp_path) for path in folder.iterdir() if path.name.startswith(".")]


def test_without_classes_or_a_test_part_it_says_so(photos, tmp_path):
    found = upstep_fast.curate("demo", photos, tmp_path / "out", **CPU)
    assert any("not all images have one" in note for note in found.notes)
    assert any("--against" in note for note in found.notes)
    assert found.counts["mislabeled"] == found.counts["conflict"] == found.counts["leak"] == 0
    assert found.kept == found.names and len(found.names) == 24


def test_equal_images_are_one_group(photos, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(40):
        shutil.copy(photos / "00.png", tmp_path / "in" / f"{i}.png")
    found = upstep_fast.curate("demo", tmp_path / "in", tmp_path / "out", **CPU)
    assert found.counts == dict(exact=39, near=0, leak=0, outlier=0, mislabeled=0, conflict=0)
    assert len(found.kept) == 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(data="one"), DataError, "data: .* has one image"),
        (dict(data="none"), DataError, "data: "),
        (dict(data=()), ConfigError, "demo"),
        (dict(features="other.npy"), DataError, "features: .* has features of other images"),
        (dict(features="none.npy"), DataError, "features: "),
        (dict(against=("none",)), DataError, "data: "),
        (dict(out="file"), ConfigError, "out: .* is a file"),
        (dict(out="file/x"), ConfigError, "out: cannot write"),
        (dict(out="old"), ConfigError, "out: .* earlier curation.csv; .*--overwrite"),
        (dict(apply="file.txt"), ConfigError, "apply: .* exists; .*--overwrite"),
        (dict(apply="keep.csv"), ConfigError, "apply: got keep.csv, must end in .txt"),
        (dict(apply="gone/keep.txt"), ConfigError, "apply: no folder gone"),
        (dict(drop=("odd",)), ConfigError, "drop"),
    ],
)
def test_bad_input_is_one_line(photos, tmp_path, monkeypatch, options, error, said):
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "old"):
        os.mkdir(folder)
    shutil.copy(photos / "00.png", "one")
    for file in ("file", "file.txt", "old/curation.csv"):
        (tmp_path / file).touch()
    np.save("other.npy", np.eye(3, dtype=np.float32))
    (tmp_path / "other.txt").write_text("x/1.png\nx/2.png\nx/3.png\n")
    before = sorted(os.listdir())
    with pytest.raises(error, match=said) as caught:
        upstep_fast.curate("demo", **(dict(data=photos, out="out") | options), **CPU)
    assert "\n" not in str(caught.value) and sorted(os.listdir()) == before
